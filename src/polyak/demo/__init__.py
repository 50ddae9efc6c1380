"""What averaging buys on real data, in a minute or two: the study behind ``polyak demo``.

``tasks`` says what is trained and averaged, ``training`` does one run, ``study`` all of them; ``statistics``,
``verdict`` and ``report`` turn the numbers into a table, a sentence and files.
"""

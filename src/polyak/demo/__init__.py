"""What averaging buys on real data, in a minute or two: the study behind ``polyak demo``.

``_tasks`` says what is trained and averaged; ``_study`` does one run, all of them, and the statistics over seeds;
``_show`` turns the numbers into a table, sentences and files.
"""

"Keep pytest out of the samples: a failing test lies there on purpose, for the shop's `test_run`."
collect_ignore = ['samples']

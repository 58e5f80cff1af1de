"Measurements of fh_saas beside its peers, in one run on one machine. `README.md` says how to run and read them."

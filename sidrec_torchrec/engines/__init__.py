"""What runs independent pieces of work: this process, all cores of this machine, or a cluster. Results never depend on which."""

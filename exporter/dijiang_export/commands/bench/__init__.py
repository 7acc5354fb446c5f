"""`dijiang-export bench` and its commands: `run` has the group, and what is measured without a command."""

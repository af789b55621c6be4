"""What a trained actor becomes: a policy, a file for other programs, a repository on the Hub."""

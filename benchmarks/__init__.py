"""Side-by-side measurements against peers, each one command. Nothing else imports this."""

"""What anybody can see of a swarm: a picture kept up to date, a report made from it, and the page that shows it."""

"""Who is out there and which chain of servers is fastest."""

"""What watches over servers: rules and alerts of promises, and a dashboard."""

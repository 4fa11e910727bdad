"""Request and response bodies, by resource. What comes out passes the strict mode of OpenAI's SDK."""

"""OpenAI's Responses API over chats: bodies to chat requests, replies and chunks of chats to responses and events."""

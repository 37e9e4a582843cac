"""Anthropic's Messages API over chats: bodies to chat requests, replies and chunks of chats to messages and events."""

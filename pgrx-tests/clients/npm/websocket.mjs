// supabase-js asks for one when it is made, and Node.js has one from version 22 on; nothing here opens it.
globalThis.WebSocket ??= class {};

"""A streaming HTTP server in one event loop. Its requests share a batch; a request ends when its client disconnects.

Run: python examples/asyncio_server.py [--port 8000] [--model NAME_OR_FOLDER]; curl -Nd "Hello!" localhost:8000"""

import argparse
import asyncio

from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching import GenerationManager

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--port", type=int, default=8000)
arguments = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
manager = GenerationManager(AutoModelForCausalLM.from_pretrained(arguments.model, device_map="auto").eval())
manager.warmup()  # the engine starts now, not in the event loop


async def serve(reader, writer):
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": body.decode()}], add_generation_prompt=True)
    handle, text = manager.submit(prompt["input_ids"], max_new_tokens=200), DecodeStream(skip_special_tokens=True)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n")
    try:
        async for token in handle:
            writer.write((text.step(tokenizer.backend_tokenizer, token) or "").encode())
            await writer.drain()
    finally:
        handle.cancel()  # does nothing if the request has ended
        writer.close()


loop = asyncio.new_event_loop()
loop.run_until_complete(asyncio.start_server(serve, "localhost", arguments.port))
print(f"Listening on port {arguments.port}", flush=True)
loop.run_forever()

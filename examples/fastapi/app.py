"""A site that tells stories: the lifespan owns the engine, each request's handler owns its stream.

Run it with `uvicorn app:app`. Its tests, in test_app.py, need no model and no torch.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

import streamgen as sg


def make_app(engine: sg.TextEngine) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.exception_handler(sg.StreamgenError)
    async def refuse(request: Request, error: sg.StreamgenError) -> JSONResponse:
        retry_after = getattr(error, "retry_after", None)
        headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        return JSONResponse({"error": error.code}, status_code=error.http_status, headers=headers)

    @app.get("/story")
    async def story(about: str) -> StreamingResponse:
        stream = engine.stream([sg.user(f"Tell a story about {about}.")], max_tokens=200, timeout=30)
        await stream.__aenter__()  # refusals surface here, before the response begins

        async def texts() -> AsyncIterator[str]:
            try:
                async for text in stream.texts():
                    yield text
            except sg.StreamgenError:  # the response has begun: all that is left is to say so
                yield "\n[cut short]"
            finally:
                await stream.__aexit__(None, None, None)

        return StreamingResponse(texts(), media_type="text/plain")

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        return {"state": engine.state.value, "running": engine.stats().running}

    return app


app = make_app(sg.Engine())

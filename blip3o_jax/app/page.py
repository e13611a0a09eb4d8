"""The page: images from prompts, edits of edits, and a history to walk back through. One `View` per browser tab."""

import asyncio
import base64
import dataclasses
import io

from fastapi import FastAPI
from nicegui import events, ui
from PIL import Image
from starlette.concurrency import run_in_threadpool

from blip3o_jax.app.api import Api, answers, error_of
from blip3o_jax.app.batching import Job
from blip3o_jax.app.service import Ask
from blip3o_jax.config.schema import from_dict
from blip3o_jax.data.images import load_image, png_bytes
from blip3o_jax.errors import UserError

LOOK = 0.2  # seconds between updates of the progress
THUMBNAIL, PREVIEW = 96, 512  # pixels
TURNS, HISTORY = 100, 2**27  # most images of one tab, and most bytes of their PNGs; the oldest are dropped
SHARP = "image-rendering: pixelated; object-fit: contain"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One image of a tab's history."""

    number: int
    text: str  # the prompt, or the name of an uploaded file
    parent: int | None  # number of the turn that was edited
    png: bytes
    thumbnail: str  # data URL
    token_map: str  # data URL; "" of an upload

    @property
    def label(self) -> str:
        """Describe the turn in a line."""
        origin = "" if self.parent is None else f" (edit of {self.parent})"
        return f"{self.number}{origin}: {self.text}"


def add_page(app: FastAPI, api: Api, upload: int) -> None:
    """Serve the page at `/`; `upload` is the largest size of an uploaded image in bytes."""
    ui.page("/", title=f"{api.model} - blip3o_jax")(lambda: View(api, upload))
    ui.run_with(app, show_welcome_message=False, reconnect_timeout=10)


class View:
    """Widgets and handlers of one browser tab."""

    def __init__(self, api: Api, upload: int):
        self._api, self._turns, self._shown = api, [], None
        self._work: asyncio.Task | None = None
        self._count = 0
        ui.context.client.on_delete(self.stop)
        with ui.row().classes("w-full no-wrap justify-center q-gutter-md"):
            with ui.column().style("width: 22rem"):
                self._inputs(upload)
            with ui.column().style("width: 27rem"):
                self._outputs()
                self._history = ui.row().classes("q-gutter-xs")
        self._refresh()

    def _inputs(self, upload: int) -> None:
        choices = self._api.service.choices
        sizes = [f"{width}x{height}" for width, height in choices.sizes]
        ui.label(self._api.model).classes("text-h6")
        self._fields = fields = {"prompt": ui.textarea("Prompt, or what to change").props("autogrow")}
        with ui.row().classes("w-full"):
            self._new = ui.button("Generate", on_click=lambda: self._start(None))
            self._edit = ui.button("Edit image", on_click=lambda: self._start(self._shown))
            self._halt = ui.button("Stop", on_click=self.stop, color="grey")
        fields["size"] = ui.select(sizes, value=sizes[0], label="Size")
        fields["num_inference_steps"] = ui.select(list(choices.steps), value=choices.steps[0], label="Steps")
        fields["guidance_scale"] = ui.number("Guidance scale (empty: the model's own)", step=0.5)
        fields["token_guidance_scale"] = ui.number("Token guidance scale (empty: the model's own)", step=0.5)
        fields["negative_prompt"] = ui.input("Negative prompt")
        several = [count for count in (1, 2, 4, 8, 16) if count <= self._api.service.candidates]
        fields["best_of"] = ui.select(several, value=1, label="Best of")
        fields["best_of"].visible = len(several) > 1
        fields["seed"] = ui.number("Seed (empty: any)", precision=0)
        for field in fields.values():
            field.classes("w-full")
        self._upload = ui.upload(
            label="Upload an image to edit", auto_upload=True, max_file_size=upload, on_upload=self._uploaded,
            on_rejected=lambda: ui.notify(f"image: larger than {upload:,} bytes", type="negative"),
        ).props("accept=image/*").classes("w-full")  # fmt: skip

    def _outputs(self) -> None:
        big = f"width: 27rem; height: 27rem; background: #f4f4f4; {SHARP}"
        self._image = ui.image().style(big).props("fit=contain no-spinner")
        self._bar = ui.linear_progress(0, show_value=False)
        self._status = ui.label("").classes("text-caption status")
        with ui.row().classes("items-center no-wrap"):
            self._download = ui.button("Download", on_click=self._save)
            self._map = ui.image().style(f"width: 6rem; height: 6rem; flex: none; {SHARP}").props("no-spinner")
            ui.label("Image tokens: similar codes have similar colours").classes("text-caption")

    def stop(self) -> None:
        """Cancel the running request."""
        if self._work is not None:
            self._work.cancel()

    async def _start(self, edited: Turn | None) -> None:
        """Generate an image, or edit a given one."""
        if self._work is not None:
            return
        self._work = asyncio.current_task()
        self._refresh()
        try:
            ask = self._ask()
            references = [] if edited is None else [await run_in_threadpool(load_image, edited.png)]
            [job] = await run_in_threadpool(self._api.service.jobs, ask, references, watched=True)
            waiting = asyncio.create_task(answers(self._api.batcher, [job]))
            try:
                while not (await asyncio.wait([waiting], timeout=LOOK))[0]:
                    self._look(job)
            finally:
                waiting.cancel()
            [made] = waiting.result()
            token_map = await run_in_threadpool(self._api.service.token_map, made.tokens)
            png = await run_in_threadpool(lambda: made.png)
            parent = None if edited is None else edited.number
            self._add(ask.prompt, parent, made.image, png, _inline(token_map, PREVIEW))
        except asyncio.CancelledError:
            self._status.text = "stopped"
        except Exception as error:
            ui.notify(str(error_of(error)), type="negative", multi_line=True)
        finally:
            self._work = None
            self._refresh()

    def _ask(self) -> Ask:
        """Read the request from the form."""
        values = {name: field.value for name, field in self._fields.items() if field.value not in (None, "")}
        if "seed" in values:
            values["seed"] = int(values["seed"])
        return from_dict(Ask, {"prompt": "", **values})

    def _look(self, job: Job) -> None:
        """Show the progress of a job."""
        if job.seen is None:
            self._status.text = f"waiting, {self._api.batcher.waiting} images in the queue"
            return
        self._status.text = f"{job.seen.stage} {job.seen.done}/{job.seen.total}"
        self._bar.value = job.seen.done / job.seen.total
        if job.seen.image is not None:
            target = self._map if job.seen.stage == "tokens" else self._image
            target.set_source(_inline(job.seen.image, PREVIEW))

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        self._upload.reset()
        try:
            image = await run_in_threadpool(load_image, await event.file.read())
            self._add(event.file.name, None, image, await run_in_threadpool(png_bytes, image))
        except UserError as error:
            ui.notify(str(error), type="negative", multi_line=True)

    def _add(self, text: str, parent: int | None, image: Image.Image, png: bytes, token_map: str = "") -> None:
        self._count += 1
        self._shown = Turn(self._count, text, parent, png, _inline(image, THUMBNAIL), token_map)
        self._turns = [*self._turns, self._shown][-TURNS:]
        while len(self._turns) > 1 and sum(len(turn.png) for turn in self._turns) > HISTORY:
            del self._turns[0]
        self._refresh()

    def _back(self, turn: Turn) -> None:
        self._shown = turn
        self._refresh()

    def _save(self) -> None:
        ui.download.content(self._shown.png, f"blip3o-{self._shown.number}.png", "image/png")

    def _refresh(self) -> None:
        """Show the selected turn and enable the buttons that apply."""
        idle, turn = self._work is None, self._shown
        self._new.set_enabled(idle)
        self._edit.set_enabled(idle and turn is not None)
        self._halt.set_enabled(not idle)
        self._download.set_enabled(turn is not None)
        self._bar.visible = not idle
        if turn is not None and idle:
            self._image.set_source(f"/images/{self._api.shelf.put(turn.png)}.png")
            self._map.set_source(turn.token_map)
            self._status.text = turn.label
        self._history.clear()
        with self._history:
            for each in self._turns:
                button = ui.button(on_click=lambda each=each: self._back(each)).props("flat padding=xs")
                button.classes("turn").set_enabled(idle)
                with button.tooltip(each.label):
                    ui.image(each.thumbnail).style(f"width: 4rem; height: 4rem; {SHARP}")
                    ui.label(f"{each.number}" + ("" if each.parent is None else f" < {each.parent}"))


def _inline(image: Image.Image, largest: int) -> str:
    """Encode a small copy as a data URL."""
    image = image.copy()
    image.thumbnail((largest, largest))
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

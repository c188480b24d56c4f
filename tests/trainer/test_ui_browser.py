"""`neartune ui` as a person uses it, in Debian's Chromium: from a preset to an answer."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect

from neartune import recipe
from neartune.records import runs
from tests.trainer.bases import FACTS, TRAINER, environment, write_jsonl

CHROMIUM = "/usr/bin/chromium"
PRESET = """base_model: ./llama
train_data: ./facts.jsonl

train_batch_size: 4
micro_batch_size: 4
processes: 1
lora_rank: 4
max_steps: 6
learning_rate: 2e-2
prompts: ["What is 2 and 3?"]
"""
PATIENT = 60_000
"""Milliseconds."""


async def test_from_a_preset_to_an_answer(llama: Path, tmp_path: Path) -> None:
    home, presets = tmp_path / "home", tmp_path / "presets"
    for folder in (home, presets):
        folder.mkdir()
    (presets / "llama").symlink_to(llama)
    write_jsonl(presets / "facts.jsonl", FACTS)
    (presets / "tiny.yaml").write_text(PRESET)
    words = (sys.executable, "-m", "neartune", "ui", "--port", "0", "--runs", str(home), "--presets", str(presets))
    served = await asyncio.create_subprocess_exec(*words, env=environment(PYTHONPATH=str(TRAINER)), stdout=subprocess.PIPE)
    assert served.stdout is not None
    try:
        found = re.search(r"http://\S+", (await served.stdout.readline()).decode())
        assert found
        errors = await used(found[0], home)
    finally:
        served.terminate()
        await served.communicate()
    assert (served.returncode, errors) == (0, [])


async def used(address: str, home: Path) -> list[str]:
    """What the browser complained of."""
    errors: list[str] = []
    expect.set_options(timeout=PATIENT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB")
        page.set_default_timeout(PATIENT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)
        await page.goto(address)
        await expect(page).to_have_url(address.partition("?")[0])  # the token is seen no more
        await a_recipe_is_set_right(page)
        await it_is_watched_to_its_end(page, home)
        await it_is_chinese_and_fits_a_narrow_screen(page)
        await the_adapter_answers(page)
        await browser.close()
    return errors


async def a_recipe_is_set_right(page: Page) -> None:
    editor = page.get_by_label("Recipe, in YAML")
    await expect(editor).to_have_value(PRESET)
    await expect(page.locator(".verdict")).to_have_text("Nothing is wrong with this recipe.")
    sheet = await page.locator(".paper").bounding_box()
    assert sheet and sheet["width"] > 1000, "no room is kept for complaints"
    await editor.fill(PRESET.replace("lora_rank: 4", "lora_rnk: 4"))
    note = page.locator(".notes li")
    await expect(note).to_have_text("Line 7there is no setting 'lora_rnk'; did you mean lora_rank?")
    await expect(page.locator(".gutter .wrong")).to_have_text("7")
    number, beside = await page.locator(".gutter .wrong").bounding_box(), await note.bounding_box()
    assert number and beside and abs(number["y"] - beside["y"]) < 4
    await expect(page.get_by_role("button", name="Start")).to_be_disabled()
    await page.get_by_role("button", name="Line 7").click()
    await page.keyboard.insert_text("lora_rank: 4")  # the line was selected
    await expect(editor).to_have_value(PRESET)
    await expect(note).to_have_count(0)
    await page.get_by_label("Name of the run").fill("first")
    await page.get_by_role("button", name="Start").click()
    await expect(page.get_by_role("heading", name="first")).to_be_visible()


async def it_is_watched_to_its_end(page: Page, home: Path) -> None:
    report = page.get_by_role("link", name="Report")
    await expect(report).to_be_visible()
    await expect(page.locator(".badge")).to_have_text("finished")
    await expect(page.locator(".numbers").first).to_contain_text("step6of 6")
    assert await page.locator("svg circle").count() > 6  # an evaluation before, and one after each step
    await expect(page.locator("svg .line")).to_have_count(1)
    await expect(page.locator(".samples")).to_contain_text("What is 2 and 3?")
    await expect(page.get_by_label("Log")).to_contain_text("all 6 steps are done")
    run = runs.read(home / "first", "first")
    assert recipe.load(home / "first.yaml").recipe.output_dir == run.path
    async with page.context.expect_page() as opened:
        await report.click()
    shown = await opened.value
    await expect(shown.get_by_role("heading", name="Curves")).to_be_visible()
    await shown.close()


async def it_is_chinese_and_fits_a_narrow_screen(page: Page) -> None:
    await page.get_by_role("button", name="中文").click()
    await expect(page.get_by_role("link", name="报告")).to_be_visible()
    await expect(page.locator(".badge")).to_have_text("已完成")
    await expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    await page.reload()
    await expect(page.get_by_role("link", name="训练记录")).to_be_visible()  # it was remembered
    await page.set_viewport_size({"width": 400, "height": 800})
    for link in ("新建训练", "训练记录"):
        await page.get_by_role("link", name=link).click()
        await expect(page.get_by_role("heading", level=1)).to_have_text(link)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 400
    await page.get_by_role("link", name="first").click()
    await page.get_by_role("link", name="与它对话").click()


async def the_adapter_answers(page: Page) -> None:
    question = page.get_by_label("问题")
    await expect(question).to_be_visible()
    await expect(page.get_by_label("模型")).to_have_value("first")
    await page.get_by_label("并列对比").select_option("base:first")
    await page.get_by_label("最多词元数").fill("8")
    await question.fill("What is 2 and 3?")
    await question.press("Enter")
    await expect(page.locator(".turn.user")).to_have_text("What is 2 and 3?")
    await expect(page.get_by_role("button", name="发送")).to_be_visible()  # it said 停止 until both answers were whole
    adapter, base = await page.locator(".said span").all_text_contents()
    assert adapter and base and adapter != base
    assert "没有回答" not in adapter + base
    assert await page.evaluate("document.documentElement.scrollWidth") <= 400

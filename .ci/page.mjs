// The page in a real browser: takes these steps and prints what was seen as one JSON document. The model local/k2 plays
// the part that a message names.
// node page.mjs ORIGIN KEY STEP...
import { chromium } from "playwright-core";

const [origin, key, ...wanted] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const result = { problems: [], elsewhere: [], wide: [], shifts: [] };

async function open(options, path = "/") {
  const page = await browser.newPage({ viewport: { width: 1200, height: 800 }, locale: "en", ...options });
  page.on("pageerror", (error) => result.problems.push(String(error)));
  page.on("console", (message) => {  // the browser reports each status of an error, and what a test aborts
    if (message.type() === "error" && !/status of [45]|ERR_FAILED/.test(message.text())) result.problems.push(message.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(origin) && !request.url().startsWith("data:")) result.elsewhere.push(request.url());
  });
  page.on("dialog", (dialog) => result.problems.push(dialog.message()));
  await page.addInitScript(() => {
    window.shift = 0;
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
    }).observe({ type: "layout-shift", buffered: true });
  });
  await page.route(`${origin}/proxied/**`, (route) =>  // as a proxy that has the server under a path
    route.continue({ url: route.request().url().replace("/proxied", "") }));
  await page.goto(origin + path);
  await page.waitForFunction(() => !document.body.className);
  return page;
}

async function measure(page) {
  const [isWide, shift] = await page.evaluate(() =>
    [document.documentElement.scrollWidth > innerWidth || document.documentElement.scrollHeight > innerHeight, window.shift]);
  result.wide.push(isWide);
  result.shifts.push(shift > 0.01);
}

const focused = (page) => page.evaluate(() => {
  const element = document.activeElement;
  return element === document.body ? "" : element.ariaLabel || element.textContent;
});
async function tabTo(page, wanted) {
  for (let presses = 0; presses < 80; presses++) {
    if ((await focused(page)).includes(wanted)) return;
    await page.keyboard.press("Tab");
  }
  throw Error(`The keyboard does not reach ${wanted}`);
}

async function unlock(page) {
  await page.locator("#key").fill(key);
  await page.keyboard.press("Enter");
  await page.locator("#model option", { hasText: "local/k2" }).waitFor({ state: "attached" });
  await page.locator("#model").selectOption("local/k2");
}

const answered = (page) =>
  page.waitForFunction(() => document.querySelector(".assistant") && !document.querySelector(".waiting"));
async function ask(page, text) {
  await page.locator("#question").fill(text);
  await page.keyboard.press("Enter");
  await answered(page);
}

const refresh = (page) => Promise.all([
  page.waitForResponse("**/v1/sessions"),
  page.evaluate(() => document.dispatchEvent(new Event("visibilitychange"))),
]);
const texts = (page, selector) => page.locator(selector).allInnerTexts();
async function copied(page, button) {  // what the button has put on the clipboard
  await button.click();
  await page.locator("button", { hasText: "Copied" }).waitFor();
  await page.locator("#question").press("Control+v");
  const text = await page.locator("#question").inputValue();
  await page.locator("#question").fill("");
  return text;
}

async function keyIsAsked() {
  const page = await open({ viewport: { width: 360, height: 740 }, colorScheme: "dark" }, "/proxied/docs");
  const told = async () => [...await texts(page, "#welcome > *"), await page.locator("#wrong").innerText(),
    await page.locator("#key").getAttribute("aria-invalid")];
  await page.locator("#welcome p", { hasText: "key" }).waitFor();
  result.key = [await told()];
  result.focused = await focused(page);
  await tabTo(page, "API key");
  await page.keyboard.type("wrong");
  const [refusal] = await Promise.all([page.waitForResponse("**/v1/usage"), page.keyboard.press("Enter")]);
  await page.locator("#wrong", { hasText: "wrong" }).waitFor();
  result.key.push([refusal.status(), ...await told()]);
  await ask(page, "with a wrong key");
  result.key.push(await texts(page, ".problem p"));
  await tabTo(page, "API key");
  await page.keyboard.press("Control+a");
  await page.keyboard.type(key);
  await page.keyboard.press("Enter");
  await page.locator("#model option", { hasText: "local/k2" }).waitFor({ state: "attached" });
  await tabTo(page, "Try again");
  await page.keyboard.press("Enter");
  await page.locator(".text", { hasText: "Hello from upstream." }).waitFor();
  result.key.push(await page.locator("article").count());
  await page.locator("#fresh").click();
  result.key.push(await told());
  result.connect = (await page.locator("#connect").textContent()).includes(`${origin}/proxied/v1`);
  result.dark = await page.evaluate(() => getComputedStyle(document.documentElement).colorScheme.includes("dark"));
  await measure(page);
  await page.close();
  const context = await browser.newContext({ javaScriptEnabled: false });
  const plain = await context.newPage();
  await plain.goto(origin);
  result.noScript = await plain.locator("header p").first().innerText();
  await context.close();
}

async function conversation(page) {
  await ask(page, "one");
  await page.locator("#question").fill("two");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("lines");
  await page.keyboard.press("Enter");
  await answered(page);
  await ask(page, "three");
  result.turns = await texts(page, ".user > div, .assistant .text");
  result.thought = await page.locator(".thinking").first().innerText();
  await page.locator(".thinking summary").first().click();
  result.thought = [result.thought, await page.locator(".thinking p").first().innerText()];
  result.copied = await copied(page, page.locator("article > button").last());
  await page.locator("#fresh").click();
  result.begun = await page.locator("article").count();
}

async function stop(page) {
  await page.locator("#question").fill("words without end");
  await page.keyboard.press("Enter");
  await page.locator(".text", { hasText: "word word word" }).waitFor();
  await page.locator("#send", { hasText: "Stop" }).click();
  await answered(page);
  result.stopped = [await page.locator(".assistant > .soft").innerText(), await page.locator("#send").innerText()];
  await ask(page, "after the stop");
  result.stopped.push(await page.locator("article").count());
}

async function markdown(page) {
  const before = Date.now();
  await ask(page, "markdown");
  result.seconds = (Date.now() - before) / 1000;
  const count = (selector) => page.locator(`.assistant .text ${selector}`).count();
  result.markdown = {};
  for (const tag of ["h3", "ul", "ol", "li", "strong", "pre", "em", "td", ":is(script, img, a, svg, iframe, b)"])
    result.markdown[tag] = await count(tag);
  result.items = (await texts(page, ".text li")).slice(0, 4);
  result.cells = await texts(page, ".text td");
  result.inline = await texts(page, ".text :not(pre) > code");
  result.code = await page.locator(".text pre").first().innerText();
  result.copiedCode = await copied(page, page.locator(".text .code button").first());
  await measure(page);
}

async function failures(page) {
  result.failures = {};
  const tell = (part, ...told) => (result.failures[part] ??= []).push(...told);
  for (const part of ["break", "refuse", "vanish", "away"]) {
    await page.locator("#fresh").click();
    if (part === "vanish") await page.route("**/v1/chat/completions", (route) =>  // the server ends in the middle
      route.fulfill({ body: `data: ${JSON.stringify({ choices: [{ delta: { content: "Half" } }] })}\n\ndata: {"cho` }));
    if (part === "away") await page.route("**/v1/chat/completions", (route) => route.abort());
    await ask(page, part);
    tell(part, await texts(page, ".assistant .text, .problem p"));
    await page.unroute("**/v1/chat/completions");
    await page.locator(".problem button").click();
    await answered(page);
    tell(part, await texts(page, ".user > div, .assistant .text, .problem p"), await focused(page));
  }
}

async function sessions(page) {
  await page.locator("#fresh").click();
  await page.locator("[href='#sessions']").click();
  await page.locator("#users summary").first().waitFor();
  const names = () => page.locator("#users bdi").allTextContents();
  result.names = await names();
  const entry = (name) => page.locator("#users > details").filter({ has: page.locator("bdi").getByText(name, { exact: true }) });
  await entry("..").locator("summary").click();
  await entry("..").locator(".text").waitFor();
  result.read = await texts(page, "#users article > div");
  await entry("..").locator("button", { hasText: "Continue" }).click();
  await page.locator("#log article").nth(1).waitFor();
  await ask(page, "and more");
  result.continued = [await page.locator("#user").inputValue(), await page.locator("#log article").count()];
  const forget = entry("..").locator("button", { hasText: "orget" });
  await forget.dblclick();  // asks, and is no answer
  await page.locator("#question").focus();
  result.forgot = [await forget.innerText()];
  for (const name of ["..", ".", "../x/y?z#&%2F\"'"]) {
    if (!await entry(name).getAttribute("open").then((open) => open === "")) await entry(name).locator("summary").click();
    await tabTo(page, "Forget");
    await entry(name).locator("button", { hasText: "Forget" }).focus();
    await page.keyboard.press("Enter");
    result.forgot.push(await focused(page));
    await refresh(page);
    await page.keyboard.press("Enter");
    await entry(name).waitFor({ state: "detached" });
  }
  result.forgot.push(await page.evaluate(() => document.activeElement.tagName), await page.locator("#log article").count());
  result.left = await names();
}

async function staysAsItIs(page) {
  await page.locator("nav [href='#overview']").click();
  const [used] = await Promise.all([page.waitForResponse("**/v1/usage"), refresh(page)]);
  const { today } = await used.json();
  await page.locator("#today", { hasText: today.total_tokens.toLocaleString("en") }).waitFor();
  result.meters = await page.evaluate(() => Array.from(document.querySelectorAll("meter"), ({ max }) => max));
  result.bars = await page.evaluate(() => document.querySelector("#chart path").getAttribute("d").split("M").length - 1);
  await page.evaluate(() => {  // a selected text stays when the page asks again
    const text = document.querySelector("#today bdi").firstChild;
    getSelection().setBaseAndExtent(text, 0, text, 8);
  });
  await refresh(page);
  await page.waitForTimeout(100);
  result.selected = await page.evaluate(() => String(getSelection()));
  await page.evaluate(() => Object.defineProperty(document, "hidden", { value: true, configurable: true }));
  await page.waitForTimeout(200);  // a call that was under way
  let asked = 0;
  page.on("request", () => asked++);
  await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
  await page.waitForTimeout(300);
  result.askedWhileHidden = asked;
  await page.evaluate(() => delete document.hidden);
  await page.locator("[href='#api']").click();
  result.described = await page.locator("#routes", { hasText: "POST /v1/chat/completions" }).count();
}

async function languages(page) {
  const told = async () => [await page.locator("html").getAttribute("lang"), await page.locator("#send").innerText(),
    await page.locator("#question").getAttribute("aria-label"), await page.locator("nav").innerText(),
    (await texts(page, "#log .user > div")).at(-1)];
  await page.locator("#fresh").click();
  await ask(page, "Stop");  // a word of the page, which stays as it was typed
  result.languages = [await told()];
  await page.locator("#language").click();
  result.languages.push(await told());
  await page.reload();
  await page.locator("#send", { hasText: "发送" }).waitFor();
  await page.close();
  for (const locale of ["zh-CN", "zh-TW", "de"]) {
    const other = await open({ locale });
    result.languages.push(await other.locator("#send").innerText());
    await other.close();
  }
}

// What a server may say at its worst, and at its least
async function extremes() {
  const hostile = `<img src=x onerror=alert(1)>${"\u202E𝔘".repeat(500)}`;
  const counted = (tokens) => ({ requests: 1, prompt_tokens: tokens, completion_tokens: tokens, total_tokens: 2 * tokens });
  const days = Array.from({ length: 31 }, (_, day) => ({ date: `2030-01-${day + 1}`, ...counted(day === 3 ? 1e12 : day), models: {} }));
  const health = { status: "degraded", version: "1", key_required: false, uptime_seconds: 1e9, store: { kind: "redis", ok: false },
    chats: { running: 64, limit: 64 }, sessions: { kept: null, limit: 9 },
    upstreams: { kimi: {}, [hostile.slice(0, 300)]: { failing_since: 1, reason: "x".repeat(500) } } };
  const worst = {
    "/health": health,
    "/v1/usage": { limits: { requests_per_minute: 5, tokens_per_day: 1 }, days },
    "/v1/sessions": { data: Array.from({ length: 101 }, (_, at) => ({ user: `${at} ${hostile}`, created: -at, last_used: at, turns: at })) },
    "/v1/models": { data: [{ id: hostile }] },
  };
  const least = {
    "/health": { ...health, status: "ok", store: { kind: "memory", ok: true }, upstreams: {} },
    "/v1/usage": { limits: {}, days: days.map(({ date }) => ({ date, ...counted(0) })) },
    "/v1/sessions": { data: [] },
    "/v1/models": { data: [] },
  };
  for (const [width, colorScheme, locale, answers] of [
    [360, "light", "zh-CN", worst], [1600, "dark", "zh-CN", least], [900, "light", "en", worst], [360, "dark", "en", least],
  ]) {
    const context = await browser.newContext({ viewport: { width, height: 740 }, colorScheme, locale });
    for (const path in answers) await context.route(origin + path, (route) => route.fulfill({ json: answers[path] }));
    const opened = await context.newPage();
    opened.on("pageerror", (error) => result.problems.push(String(error)));
    await opened.goto(origin);
    await opened.locator("#connect .code").first().waitFor({ state: "attached" });
    await opened.locator("#today tr").first().waitFor({ state: "attached" });
    for (const tab of ["chat", "overview", "sessions", "connect", "api"]) {
      await opened.evaluate((tab) => location.hash = tab, tab);
      await opened.waitForTimeout(50);
      result.wide.push(await opened.evaluate(() => document.documentElement.scrollWidth > innerWidth ||
        Array.from(document.querySelectorAll("nav, nav a")).some((tab) => tab.scrollWidth > tab.clientWidth || tab.offsetHeight > 40) ||
        Array.from(document.querySelectorAll("section")).some((section) => section.scrollWidth > section.clientWidth)));
    }
    (result.told ??= []).push(await opened.evaluate(() => [
      document.querySelector("#status").textContent,
      document.querySelectorAll("#upstreams .bad").length,
      document.querySelectorAll("img").length,
      document.querySelectorAll("#users > details").length,
      new Set(Array.from(document.querySelectorAll("#users summary"), (entry) => entry.offsetHeight)).size || 1,  // one line each
      document.querySelector("#sessions > p").textContent,
    ]));
    await context.close();
  }
}

// What arrives late takes nothing away from what is there; a server that has gone is told
async function lateAnswers() {
  const page = await open({});
  const users = ["a", "b", "c"];
  await page.route("**/v1/sessions", (route) => route.fulfill({
    json: { data: users.map((user, at) => ({ user, created: at, last_used: at, turns: 1 })) },
  }));
  await page.route("**/v1/models", async (route) => {
    if (route.request().headers().authorization?.endsWith("wrong")) await new Promise((done) => setTimeout(done, 500));
    await route.continue();
  });
  const refused = page.waitForResponse((answer) => answer.url().endsWith("/v1/models") && answer.status() === 401);
  for (const typed of ["wrong", key]) {
    await page.locator("#key").fill(typed);
    await Promise.all([page.waitForRequest("**/v1/models"), page.keyboard.press("Enter")]);
  }
  await refused;
  await page.locator("[href='#sessions']").click();
  await page.locator("#users summary").nth(2).focus();
  users.pop();
  await refresh(page);
  await page.waitForFunction(() => document.querySelectorAll("#users details").length === 2);
  result.late = [await page.locator("#model").inputValue(), await page.locator("#welcome p").innerText()];
  await page.route("**/health", (route) => route.fulfill({ body: "<p>Somebody else's page" }));
  await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
  await page.locator("#status.bad").waitFor();
  result.away = [await page.locator("#status").innerText(), await page.locator("#upstreams").textContent()];
  await page.close();
}

const withKey = { conversation, stop, markdown, failures, sessions, staysAsItIs, languages };
for (const step of wanted) {
  if (!(step in withKey)) {
    await { keyIsAsked, extremes, lateAnswers }[step]();
    continue;
  }
  const page = await open({});
  await unlock(page);
  await withKey[step](page);
  if (!page.isClosed()) await measure(page);
  await page.close();
}
await browser.close();
console.log(JSON.stringify(result));

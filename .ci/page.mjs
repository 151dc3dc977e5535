// The page in a real browser. First by keyboard alone, on a phone in the dark: asks for the key, shows what is used and
// forgets a session; then a chat; then what a server may say at its worst, in two widths, schemes and languages.
// node page.mjs ORIGIN KEY
import { chromium } from "playwright-core";

const [origin, key] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const problems = [], elsewhere = [], wide = [];

async function open(options) {
  const page = await browser.newPage(options);
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {  // a key that is refused is told by the browser too
    if (message.type() === "error" && !message.text().includes("status of 401")) problems.push(message.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(origin) && !request.url().startsWith("data:")) elsewhere.push(request.url());
  });
  page.on("dialog", (dialog) => problems.push(dialog.message()));
  return page;
}

const isWide = (page) =>
  page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
const bars = (page) => page.evaluate(() => [...document.querySelectorAll("meter")].map(({ value, max }) => [value, max]));
const names = (page) => page.locator("#users td:first-child").allTextContents();
const focused = (page) => page.evaluate(() => document.activeElement.ariaLabel || document.activeElement.id);
const lookAgain = (page) => Promise.all([
  page.waitForResponse("**/v1/sessions"),
  page.evaluate(() => document.dispatchEvent(new Event("visibilitychange"))),
]);

async function tabTo(page, wanted) {
  for (let presses = 0; presses < 60; presses++) {
    if ((await focused(page)).startsWith(wanted)) return;
    await page.keyboard.press("Tab");
  }
  throw Error(`The keyboard does not reach ${wanted}`);
}

async function forget(page, name, ...keys) {
  await tabTo(page, `Forget ${name}`);
  await page.keyboard.press("Enter");
  await page.locator("#sure[open]").waitFor();
  await lookAgain(page);
  if (!(await page.locator("#sure").isVisible())) problems.push("a look at the server has closed the question");
  for (const pressed of keys) await page.keyboard.press(pressed);
  await page.locator("#sure").waitFor({ state: "hidden" });
}

const result = {};
const page = await open({ viewport: { width: 360, height: 740 }, colorScheme: "dark", locale: "en-GB" });
await page.route(`${origin}/proxied/**`, (route) =>  // as a proxy that has the server under a path
  route.continue({ url: route.request().url().replace("/proxied", "") }));
await page.goto(`${origin}/proxied/docs`);
await page.locator("#status", { hasText: "ok" }).waitFor();
await page.locator("#key").waitFor({ state: "visible" });
const refusals = async () => [
  await page.locator("#usage > [role=status]").textContent(), await page.locator("#sessions > [role=status]").textContent(),
  await page.locator("#today").isVisible(), await page.locator("#users").isVisible(),
];
await page.locator("#usage > [role=status]", { hasText: "key" }).waitFor();
result.noKey = await refusals();
await tabTo(page, "key");
await page.keyboard.type("wrong");
const [refusal] = await Promise.all([page.waitForResponse("**/v1/usage"), page.keyboard.press("Enter")]);
result.wrongKey = [refusal.status(), ...await refusals()];
await page.keyboard.press("Control+a");
await page.keyboard.type(key);
await page.keyboard.press("Enter");
await page.locator("#users button").first().waitFor();
result.bars = await bars(page);
result.limit = await page.locator("#today", { hasText: "600" }).count();
result.names = await names(page);
result.drawn = await page.evaluate(() => [...document.querySelectorAll("#chart path")].map((path) => path.getAttribute("d")));
await forget(page, "../x", "Escape");
result.backAt = await focused(page);
await forget(page, "../x", "Tab", "Enter");
await forget(page, "😀", "Tab", "Enter");
result.focusAfter = await focused(page);
await lookAgain(page);
await page.waitForFunction(() => document.querySelectorAll("#users tr").length === 2);
result.left = await names(page);

await page.evaluate(() => {  // a text that is selected and a place in the page stay when the page looks again
  document.querySelector("#api").scrollIntoView();
  const text = document.querySelector("#today bdi").firstChild;
  getSelection().setBaseAndExtent(text, 0, text, 8);
  window.before = [scrollY, String(getSelection())];
});
await lookAgain(page);
result.stays = await page.evaluate(() => String([scrollY, String(getSelection())]) === String(window.before));
await page.evaluate(() => Object.defineProperty(document, "hidden", { value: true, configurable: true }));
let asked = 0;
page.on("request", () => asked++);
await page.waitForTimeout(200);  // a look that was under way
asked = 0;
await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
await page.waitForTimeout(300);
result.askedWhileHidden = asked;
await page.evaluate(() => delete document.hidden);

await page.locator("#model option[value=kimi]").waitFor({ state: "attached" });
await page.locator("#question").fill("Hello <b>browser</b>");
await page.locator("#send").click();
await page.locator("#chat .assistant", { hasText: "Hello from upstream." }).waitFor();
await page.waitForFunction(() => document.querySelector("#stop").ariaDisabled === "true");
wide.push(await isWide(page));
result.asked = await page.locator("#chat .user").last().textContent();
result.described = await page.locator("#api", { hasText: "/v1/chat/completions" }).count();
result.connect = (await page.locator("#connect").textContent()).includes(`${origin}/proxied/v1`);
result.dark = await page.evaluate(() => getComputedStyle(document.documentElement).colorScheme.includes("dark"));
await page.close();

const hostile = `<img src=x onerror=alert(1)>${"\u202E𝔘".repeat(5000)}`;
const counted = (tokens) => ({ requests: 1, prompt_tokens: tokens, completion_tokens: tokens, total_tokens: 2 * tokens });
const days = Array.from({ length: 31 }, (_, day) =>
  ({ date: `2030-01-${day + 1}`, ...counted(day === 3 ? 1e12 : day % 3), models: { [hostile]: counted(1e9) } }));
const worst = {
  "/v1/usage": { limits: { requests_per_minute: 0, tokens_per_day: 1 }, today: days[30], days },
  "/v1/sessions": { data: Array.from({ length: 101 }, (_, at) => ({ user: `${at} ${hostile}`, created: -at, last_used: at, turns: at })) },
  "/health": {
    status: "degraded", key_required: false, uptime_seconds: 1e9, chats: { running: 64, limit: 64 },
    sessions: { kept: null, limit: 9 }, store: { kind: "redis", ok: false },
    upstreams: { kimi: {}, [hostile.slice(0, 300)]: { failing_since: 1, reason: "x".repeat(500) } },
  },
};
const none = days.map(({ date }) => ({ date, ...counted(0), requests: 0, models: {} }));
const nothing = { ...worst, "/v1/sessions": { data: [] }, "/v1/usage": { ...worst["/v1/usage"], limits: {}, days: none } };
for (const [width, colorScheme, locale, answers] of [
  [360, "light", "zh-TW", worst], [1200, "dark", "zh-CN", nothing], [1200, "light", "en", worst], [360, "dark", "de", nothing],
]) {
  const page = await open({ viewport: { width, height: 740 }, colorScheme, locale });
  for (const path in answers) await page.route(`${origin}${path}`, (route) => route.fulfill({ json: answers[path] }));
  await page.goto(origin);
  await page.locator("#users tr").first().waitFor();
  await page.locator("#api tr").nth(5).waitFor();
  await page.locator("summary").first().click();
  wide.push(await isWide(page));
  (result.told ??= []).push(await page.evaluate(() => [
    document.documentElement.lang,
    document.querySelector("#status").textContent,
    document.querySelector("h2").textContent,
    document.querySelectorAll("#server .error").length,
    document.querySelectorAll("img").length,
    document.querySelector("#users bdi").textContent.slice(0, 2),
    Math.max(...[...document.querySelectorAll("#users bdi, #models bdi")].map((name) => name.textContent.length)),
    [...document.querySelectorAll("#chart path")].map((path) => path.getAttribute("d").split("M").length - 1),
  ]));
  await page.close();
}

// What comes late, or has gone, takes nothing away from what is there
const late = await open({ locale: "en" });
await late.route("**/v1/models", async (route) => {
  if (route.request().headers().authorization?.endsWith("wrong")) await new Promise((done) => setTimeout(done, 500));
  await route.continue();
});
const users = ["a", "b", "c"];
await late.route("**/v1/sessions", (route) => route.fulfill({
  json: { data: users.map((user, at) => ({ user, created: at, last_used: at, turns: 1 })) },
}));
await late.goto(origin);
const refused = late.waitForResponse((answer) => answer.url().endsWith("/v1/models") && answer.status() === 401);
for (const typed of ["wrong", key]) {
  await late.locator("#key").fill(typed);
  await Promise.all([late.waitForRequest("**/v1/models"), late.keyboard.press("Enter")]);
}
await refused;
await late.locator("#users button").nth(2).focus();
users.pop();
await lookAgain(late);
await late.waitForFunction(() => document.querySelectorAll("#users tr").length === 2);
result.late = [await late.locator("#model").inputValue(), await focused(late)];
let forgotten;
const slowly = new Promise((done) => forgotten = done);
await late.route("**/v1/sessions/*", (route) => slowly.then(() => route.fulfill({ json: {} })));
await late.locator("#users button").first().click();
await late.locator("#sure button").last().click();
await late.keyboard.press("Escape");
await late.locator("#users button").last().click();
users.pop();
forgotten();
await late.waitForFunction(() => document.querySelectorAll("#users tr").length === 1);
result.late.push(await late.locator("#sure").isVisible());
await late.keyboard.press("Escape");

// An answer that fails half way, or ends there
const said = (delta) => `data: ${JSON.stringify({ choices: [{ delta }] })}\n\n`;
const failure = `data: ${JSON.stringify({ error: { message: "It failed.", code: "why" } })}\n\n`;
const thoughts = said({ reasoning_content: "I " }) + said({ reasoning_content: "think." });
for (const end of [failure, said({ content: "Half " }) + said({ content: "of it" })]) {
  await late.route("**/v1/chat/completions", (route) => route.fulfill({ body: thoughts + end }));
  await late.locator("#question").fill("Well?");
  await tabTo(late, "send");
  await late.keyboard.press("Enter");
  await late.locator("#chat .error").waitFor();
  (result.broken ??= []).push([
    await late.locator("#chat").innerText(), await late.locator("#question").inputValue(), await focused(late),
  ]);
  await late.evaluate(() => document.querySelector("#chat").replaceChildren());
}
await late.locator("#connect summary").first().click();
await late.locator("#connect button").first().click();
await late.locator("#question").fill("");
await late.keyboard.press("Control+v");
result.copied = (await late.locator("#question").inputValue()).slice(0, 5);
await late.route("**/health", (route) => route.fulfill({ body: "<p>Somebody else's page" }));
await late.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
await late.locator("#status.degraded").waitFor();
result.away = await late.locator("#server").innerText();
await browser.close();
console.log(JSON.stringify({ problems, elsewhere, wide, ...result }));

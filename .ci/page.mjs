// The page in a real browser: asks for the key, shows the state, streams a chat, fits a phone in the dark.
// node page.mjs ORIGIN KEY
import { chromium } from "playwright-core";

const [origin, key] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 360, height: 740 }, colorScheme: "dark" });
const problems = [], elsewhere = [];
page.on("pageerror", (error) => problems.push(String(error)));
page.on("request", (request) => {
  if (!request.url().startsWith(origin) && !request.url().startsWith("data:")) elsewhere.push(request.url());
});
await page.goto(`${origin}/docs`);
await page.locator("#status", { hasText: "ok" }).waitFor();
await page.locator("#key").waitFor({ state: "visible" });
const ask = async (text) => {
  await page.locator("#question").fill(text);
  await page.locator("#send").click();
  await page.locator("#stop").isDisabled();
};
await ask("without a key");
await page.locator("#chat .error", { hasText: "key" }).waitFor();
await page.locator("#key").fill(key);
await page.locator("#key").press("Tab");
await page.locator("#model option[value=kimi]").waitFor({ state: "attached" });
await ask("Hello <b>browser</b>");
await page.locator("#chat .assistant", { hasText: "Hello from upstream." }).waitFor();
await page.waitForFunction(() => document.querySelector("#stop").disabled);
const wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
const asked = await page.locator("#chat .user").last().textContent();
const described = await page.locator("#api", { hasText: "/v1/chat/completions" }).count();
const connect = await page.locator("#connect").textContent();
const dark = await page.evaluate(() => getComputedStyle(document.documentElement).colorScheme.includes("dark"));
await browser.close();
console.log(JSON.stringify({ problems, elsewhere, wide, asked, described, dark, connect: connect.includes(`${origin}/v1`) }));

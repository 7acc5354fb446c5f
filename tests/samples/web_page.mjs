// Drives samples/web/index.html in a headless Chromium: node web_page.mjs URL CHROMIUM TOKENS
//
// Once the page is ready the browser is taken offline; then it generates. Prints one line of JSON.

import { createRequire } from 'node:module';
import { join } from 'node:path';

const [url, executablePath, tokens] = process.argv.slice(2);
const puppeteer = createRequire(join(process.env.DIJIANG_NODE_MODULES, 'any.js'))('puppeteer-core');
const args = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--enable-precise-memory-info'];
const browser = await puppeteer.launch({ executablePath, headless: true, args });
try {
    const page = await browser.newPage();
    const errors = [];
    const requests = [];
    page.on('pageerror', (error) => errors.push(String(error)));
    page.on('console', (message) => { if (message.type() === 'error') errors.push(message.text()); });
    page.on('request', (request) => requests.push(request.url()));
    await page.goto(url);
    const status = (pattern) => page.waitForFunction(
        (source) => new RegExp(source).test(document.getElementById('status').textContent),
        { timeout: 90000 }, pattern,
    );
    const text = (id) => page.$eval(`#${id}`, (node) => node.textContent);
    await status('^(ready|error)');
    const loaded = await text('status');
    const memory = [];
    const states = new Set();
    let output = '';
    if (loaded.startsWith('ready')) {
        await page.setOfflineMode(true);
        await page.$eval('#tokens', (node, value) => { node.value = value; }, tokens);
        await page.$eval('#ignore', (node) => { node.checked = true; });
        await page.click('#go');
        const heap = async () => memory.push(Math.round((await page.metrics()).JSHeapUsedSize / 1e5) / 10);
        for (let i = 0; i < 200; i += 1) {
            await new Promise((resolve) => { setTimeout(resolve, 250); });
            states.add((await text('state')).match(/\d+ bytes/)?.[0]);
            await heap();
            if (/^(done|error)/.test(await text('status'))) break;
        }
        output = await text('output');
    }
    const elements = await page.$eval('#output', (node) => node.childElementCount);
    const result = { loaded, status: await text('status'), output, elements, speed: await text('speed') };
    const seen = { state: await text('state'), states: [...states], memory, errors, requests };
    console.log(JSON.stringify({ browser: await browser.version(), ...result, ...seen }));
} finally {
    await browser.close();
}

// The page: loads a bundle, and shows what comes. All text goes into textContent: it is never read as HTML.

import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs';

import { pickedSource, urlSource } from './bundle.js';
import { generate, openModel } from './dijiang.js';
import { SampleError } from './errors.js';

const DRAWING = 40; // milliseconds of work between which the page can draw and be clicked

const at = (id) => document.getElementById(id);
let model = null;
let stopped = false;

ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send

/** The folder beside the page, or that which ?bundle= names on the same server. */
function bundleUrl() {
    const named = new URLSearchParams(location.search).get('bundle') ?? 'tiny-stdlib.bundle';
    const url = new URL(named.endsWith('/') ? named : `${named}/`, location.href);
    if (url.origin !== location.origin) throw new SampleError('the bundle must be on the server of the page');
    return url;
}

function breathe() {
    return new Promise((resolve) => { setTimeout(resolve); });
}

function show(error) {
    if (!(error instanceof SampleError)) console.error(error);
    at('status').textContent = `error: ${error.message}${error.hint ? ` (${error.hint})` : ''}`;
}

function busy(is) {
    at('go').disabled = is || model === null;
    at('folder').disabled = is;
}

async function load(source) {
    busy(true);
    try {
        const progress = (sentence) => { at('status').textContent = sentence; };
        const opened = await openModel(ort, source, { progress, session: { executionProviders: ['wasm'] } });
        await model?.release();
        model = opened;
        at('status').textContent = 'ready: nothing more is fetched';
    } catch (error) {
        show(error);
    } finally {
        busy(false);
    }
}

function options() {
    let drawn = performance.now();
    const pause = async () => {
        if (performance.now() - drawn > DRAWING) {
            await breathe();
            drawn = performance.now();
        }
        return !stopped;
    };
    const number = (id) => at(id).valueAsNumber;
    return {
        maxTokens: number('tokens'), temperature: number('temperature'), topK: number('topk'), seed: number('seed'),
        ignoreEos: at('ignore').checked, pause,
    };
}

function showEvent(event) {
    const rate = event.tokens > 1 ? `${((event.tokens - 1) / event.seconds).toFixed(1)} tokens/s` : '';
    at('speed').textContent = `${event.tokens} tokens ${rate}`;
    const length = event.promptTokens + event.tokens - 1;
    at('state').textContent = `state: ${event.stateBytes} bytes after ${length} tokens`;
}

async function run() {
    stopped = false;
    busy(true);
    at('stop').disabled = false;
    at('status').textContent = 'generating';
    const output = document.createTextNode('');
    at('output').replaceChildren(output);
    let finish = 'stopped';
    try {
        for await (const event of generate(model, at('prompt').value, options())) {
            output.appendData(event.text);
            showEvent(event);
            finish = event.finish ?? finish;
        }
        at('status').textContent = `done: ${finish}`;
    } catch (error) {
        show(error);
    } finally {
        at('stop').disabled = true;
        busy(false);
    }
}

at('form').addEventListener('submit', (event) => {
    event.preventDefault();
    run();
});
at('stop').addEventListener('click', () => { stopped = true; });
at('folder').addEventListener('change', (event) => {
    if (event.target.files.length) load(pickedSource(event.target.files));
});

try {
    load(urlSource(bundleUrl()));
} catch (error) {
    show(error);
}

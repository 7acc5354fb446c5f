// Text from a bundle in Node: node samples/web/node.mjs BUNDLE PROMPT [options]
//
// The packages are looked for in the folder that DIJIANG_NODE_MODULES names, or in node_modules beside this file.

import { constants } from 'node:fs';
import { open } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { generate, openModel } from './dijiang.js';
import { SampleError } from './errors.js';

const USAGE = `usage: node samples/web/node.mjs BUNDLE PROMPT
    --max-tokens N    128 without
    --temperature T   0: the most likely token, always
    --top-k K         only the K most likely tokens; 0: all
    --seed S
    --ignore-eos      go on after a token that ends a text
    --runtime NAME    onnxruntime-web (WebAssembly, one thread) or onnxruntime-node (native); the first without
    --json            token ids, text, times and memory as one line of JSON instead of the text`;

const OPTIONS = {
    'max-tokens': { type: 'string', default: '128' },
    temperature: { type: 'string', default: '0' },
    'top-k': { type: 'string', default: '0' },
    seed: { type: 'string', default: '0' },
    'ignore-eos': { type: 'boolean', default: false },
    runtime: { type: 'string', default: 'onnxruntime-web' },
    json: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h', default: false },
};
const PROVIDERS = { 'onnxruntime-web': 'wasm', 'onnxruntime-node': 'cpu' };

function parsed() {
    let values;
    let positionals;
    try {
        ({ values, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true }));
    } catch (error) {
        throw new Usage(error.message);
    }
    if (values.help) return { help: true };
    if (positionals.length !== 2) throw new Usage('a bundle and a prompt are needed');
    if (!Object.hasOwn(PROVIDERS, values.runtime)) throw new Usage(`there is no runtime ${values.runtime}`);
    const number = (name) => {
        if (!/^-?\d+(\.\d+)?$/.test(values[name])) throw new Usage(`--${name} is not a number`);
        return Number(values[name]);
    };
    const options = { maxTokens: number('max-tokens'), temperature: number('temperature'), topK: number('top-k') };
    Object.assign(options, { seed: number('seed'), ignoreEos: values['ignore-eos'] });
    return { folder: positionals[0], prompt: positionals[1], options, runtime: values.runtime, json: values.json };
}

class Usage extends SampleError {
    constructor(what) {
        super(what, '--help lists the options');
    }
}

function loadRuntime(name) {
    const beside = fileURLToPath(new URL('node_modules', import.meta.url));
    const folder = process.env.DIJIANG_NODE_MODULES || beside;
    let ort;
    try {
        ort = createRequire(join(folder, 'any.js'))(name);
    } catch (error) {
        throw new SampleError(`cannot load ${name} from ${folder}: ${error.code ?? error.message}`, `npm install ${name}`);
    }
    if (name === 'onnxruntime-web') ort.env.wasm.numThreads = 1;
    return ort;
}

/** Files of a folder: ordinary ones alone, and no more than `limit` bytes of them. */
function folderSource(folder) {
    return async (name, limit) => {
        let file;
        try {
            // Not waiting: a pipe of that name would keep the program for ever.
            file = await open(join(folder, name), constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
            const status = await file.stat();
            if (!status.isFile()) throw new SampleError(`${name} is no ordinary file`);
            const { size } = status;
            if (size > limit) throw new SampleError(`${name} has ${size} bytes, expected at most ${limit}`);
            const bytes = new Uint8Array(size);
            for (let at = 0; at < size; ) {
                const { bytesRead } = await file.read(bytes, at, size - at, at);
                if (!bytesRead) return bytes.subarray(0, at);
                at += bytesRead;
            }
            return bytes;
        } catch (error) {
            if (error instanceof SampleError) throw error;
            throw new SampleError(`cannot read ${join(folder, name)}: ${error.code}`, 'is it a bundle?');
        } finally {
            await file?.close();
        }
    };
}

function megabytes(bytes) {
    return Math.round(bytes / 1e5) / 10;
}

async function main() {
    const { help, folder, prompt, options, runtime, json } = parsed();
    if (help) return console.log(USAGE);
    const ort = loadRuntime(runtime);
    const session = { executionProviders: [PROVIDERS[runtime]], intraOpNumThreads: 1 };
    const model = await openModel(ort, folderSource(folder), { session });
    const seen = { ids: [], text: '', memory: [] };
    let last;
    for await (const event of generate(model, prompt, options)) {
        last = event;
        seen.ids.push(event.token);
        seen.text += event.text;
        if (!json) process.stdout.write(event.text);
        if (json && (event.tokens === 1 || event.tokens % 100 === 0)) {
            const resident = megabytes(process.memoryUsage.rss());
            seen.memory.push({ tokens: event.tokens, state_bytes: event.stateBytes, resident_megabytes: resident });
        }
    }
    const rate = last.tokens > 1 ? (last.tokens - 1) / last.seconds : null;
    const prefill = last.promptTokens / last.promptSeconds;
    if (json) {
        const speed = { prompt_tokens: last.promptTokens, prompt_rate: prefill, decode_rate: rate };
        console.log(JSON.stringify({ runtime, finish: last.finish, ...speed, ...seen }));
    } else {
        const steps = rate === null ? '' : ` at ${rate.toFixed(0)}/s`;
        const prompts = `${last.promptTokens} prompt tokens at ${prefill.toFixed(0)}/s`;
        process.stdout.write('\n');
        console.error(`${runtime}: ${prompts}, ${last.tokens} new ones${steps}, ${last.stateBytes} bytes of state`);
    }
    await model.release();
    return undefined;
}

try {
    await main();
} catch (error) {
    if (!(error instanceof SampleError)) throw error;
    console.error(`error: ${error.message}`);
    if (error.hint) console.error(`hint: ${error.hint}`);
    process.exitCode = error instanceof Usage ? 2 : 1;
}

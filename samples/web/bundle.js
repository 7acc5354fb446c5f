// A bundle's files: which there are, and that they are what the manifest says (docs/bundle-format.md).
//
// A source reads one file: async (name, limit) => Uint8Array of at most `limit` bytes, or it throws SampleError.

import { SampleError } from './errors.js';

const MAX_MANIFEST_BYTES = 16 << 20;
const MAX_GRAPH_BYTES = 256 << 20;
const MAX_TOKENIZER_BYTES = 256 << 20;
const MAX_WEIGHT_BYTES = 2 ** 31; // what one array can hold in every browser; two copies must fit into 4 GiB
const PLAIN_NAME = /^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}$/;

/**
 * Reads and checks everything that running a model needs.
 *
 * @param source where files come from.
 * @param progress called with a sentence before each file.
 * @returns {Promise<{spec, prefill: Uint8Array, step: Uint8Array, weights: Uint8Array, weightsName: string,
 *     tokenizer: object}>} graphs and weights as bytes, the spec and tokenizer.json as parsed.
 */
export async function readBundle(source, progress = () => {}) {
    progress('reading manifest.json');
    const manifest = checkManifest(parse(await source('manifest.json', MAX_MANIFEST_BYTES), 'manifest.json'));
    const read = async (name, limit) => {
        progress(`reading ${name}`);
        return readChecked(source, manifest, name, limit);
    };
    const prefill = await read(manifest.graphs.prefill.file, MAX_GRAPH_BYTES);
    const step = await read(manifest.graphs.step.file, MAX_GRAPH_BYTES);
    if (!Object.hasOwn(manifest.files, 'tokenizer.json')) {
        throw new SampleError('the bundle has no tokenizer.json', 'export a checkpoint that has one');
    }
    const tokenizer = parse(await read('tokenizer.json', MAX_TOKENIZER_BYTES), 'tokenizer.json');
    const weights = await read(manifest.weights.file, MAX_WEIGHT_BYTES);
    return { spec: manifest.spec, prefill, step, weights, weightsName: manifest.weights.file, tokenizer };
}

function parse(bytes, name) {
    try {
        return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
    } catch {
        throw new SampleError(`${name} is not JSON`);
    }
}

function checkManifest(manifest) {
    if (manifest?.format !== 'dijiang-bundle') {
        throw new SampleError('manifest.json is not that of a bundle', 'make one with `dijiang-export to-onnx`');
    }
    if (manifest.format_version !== 1 && manifest.format_version !== 2) {
        throw new SampleError(
            `the bundle is of version ${manifest.format_version}, expected 1 or 2`,
            'export it again, or use the sample that came with its exporter',
        );
    }
    const names = [manifest.graphs?.prefill?.file, manifest.graphs?.step?.file, manifest.weights?.file];
    for (const name of names) {
        if (typeof name !== 'string' || !PLAIN_NAME.test(name)) {
            throw new SampleError('manifest.json does not name the graphs and weights');
        }
    }
    if (typeof manifest.files !== 'object' || manifest.files === null) {
        throw new SampleError('manifest.json has no list of files');
    }
    if (manifest.logits !== 'last' && manifest.logits !== 'all') {
        throw new SampleError('manifest.json does not say which logits the graphs give');
    }
    checkSpec(manifest.spec);
    return manifest;
}

/** The fields that the decode loop goes by; those that only the graphs go by are in the graphs already. */
function checkSpec(spec) {
    const counts = { vocab_size: 2 ** 24, num_layers: 4096, num_heads: 2 ** 16, head_dim: 2 ** 16 };
    for (const [name, most] of Object.entries(counts)) {
        if (!Number.isSafeInteger(spec?.[name]) || spec[name] < 1 || spec[name] > most) {
            throw new SampleError(`manifest.json: spec.${name} is not a number from 1 to ${most}`);
        }
    }
    if (4 * spec.num_layers * spec.num_heads * spec.head_dim ** 2 > MAX_WEIGHT_BYTES) {
        throw new SampleError('manifest.json: the state would not fit into memory');
    }
    for (const name of ['position_embeddings', 'decay_rows']) {
        if (!Number.isSafeInteger(spec[name]) || spec[name] < 0) {
            throw new SampleError(`manifest.json: spec.${name} is not a number`);
        }
    }
    if (!Array.isArray(spec.eos_token_ids) || !spec.eos_token_ids.every(Number.isSafeInteger)) {
        throw new SampleError('manifest.json: spec.eos_token_ids is not a list of token ids');
    }
    if (spec.bos_token_id !== null && !Number.isSafeInteger(spec.bos_token_id)) {
        throw new SampleError('manifest.json: spec.bos_token_id is not a token id or null');
    }
}

async function readChecked(source, manifest, name, limit) {
    const entry = Object.hasOwn(manifest.files, name) ? manifest.files[name] : null;
    if (!Number.isSafeInteger(entry?.bytes) || entry.bytes < 0 || !/^[0-9a-f]{64}$/.test(entry?.sha256)) {
        throw new SampleError(`manifest.json has no size and hash of ${name}`);
    }
    if (entry.bytes > limit) {
        throw new SampleError(`${name} has ${entry.bytes} bytes, expected at most ${limit}`);
    }
    const bytes = await source(name, entry.bytes);
    if (bytes.length !== entry.bytes) {
        throw new SampleError(
            `${name} has ${bytes.length} bytes, expected ${entry.bytes}`, 'copy the whole bundle again',
        );
    }
    if ((await sha256(bytes)) !== entry.sha256) {
        throw new SampleError(`${name} is damaged: its SHA-256 is not the manifest's`, 'copy the bundle again');
    }
    return bytes;
}

async function sha256(bytes) {
    if (globalThis.crypto?.subtle === undefined) {
        throw new SampleError('this browser gives no SHA-256 here', 'open the page from localhost or by https');
    }
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Files below a URL, which ends with a slash. No more than `limit` bytes are taken, whatever the server sends. */
export function urlSource(base) {
    return async (name, limit) => {
        let response;
        try {
            response = await fetch(new URL(name, base), { redirect: 'error' });
        } catch (error) {
            throw new SampleError(`cannot fetch ${name}: ${error.message}`, 'is the server running?');
        }
        if (!response.ok || response.body === null) {
            throw new SampleError(`cannot fetch ${name}: the server says ${response.status}`);
        }
        const pieces = [];
        let length = 0;
        for (const reader = response.body.getReader(); ; ) {
            const { done, value } = await reader.read();
            if (done) break;
            pieces.push(value);
            length += value.length;
            if (length > limit) {
                await reader.cancel();
                throw new SampleError(`${name} has more than ${limit} bytes`);
            }
        }
        return joined(pieces, length);
    };
}

function joined(pieces, length) {
    const all = new Uint8Array(length);
    let at = 0;
    for (const piece of pieces) {
        all.set(piece, at);
        at += piece.length;
    }
    return all;
}

/** Files of a folder that the user picked: a FileList of `<input type="file" webkitdirectory>`. */
export function pickedSource(files) {
    // The folder's own files alone: a path is FOLDER/NAME.
    const own = [...files].filter((file) => file.webkitRelativePath.split('/').length === 2);
    const byName = new Map(own.map((file) => [file.name, file]));
    return async (name, limit) => {
        const file = byName.get(name);
        if (file === undefined) throw new SampleError(`the folder has no ${name}`, 'pick the bundle itself');
        if (file.size > limit) throw new SampleError(`${name} has more than ${limit} bytes`);
        return new Uint8Array(await file.arrayBuffer());
    };
}

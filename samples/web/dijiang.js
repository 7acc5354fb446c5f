// A bundle in ONNX Runtime's JavaScript packages, and the loop that generates text with it.
//
// The same in a browser and in Node: `ort` is whichever package the caller has (onnxruntime-web, onnxruntime-node).

import { readBundle } from './bundle.js';
import { SampleError } from './errors.js';
import { choose, checkSampling, uniform } from './sampling.js';
import { Tokenizer } from './tokenizer.js';

const PIECE = 128; // prompt tokens that one call takes, between which a page can draw and be stopped
const MAX_POSITIONS = 2 ** 31 - 128; // positions are int32 in the graphs, and none may wrap while a call counts on

/**
 * Opens a bundle.
 *
 * @param ort the package.
 * @param source where files come from (bundle.js).
 * @param {{progress?: (sentence: string) => void, session?: object}} options `session` goes to
 *     InferenceSession.create.
 */
export async function openModel(ort, source, { progress = () => {}, session = {} } = {}) {
    const bundle = await readBundle(source, progress);
    const tokenizer = new Tokenizer(bundle.tokenizer);
    const externalData = [{ path: bundle.weightsName, data: bundle.weights }];
    const sessions = {};
    for (const graph of ['prefill', 'step']) {
        progress(`starting the ${graph} graph`);
        try {
            sessions[graph] = await ort.InferenceSession.create(bundle[graph], { ...session, externalData });
        } catch (error) {
            throw new SampleError(`ONNX Runtime cannot run the ${graph} graph: ${error.message ?? error}`);
        }
    }
    return new Model(ort, bundle.spec, tokenizer, sessions);
}

export class Model {
    constructor(ort, spec, tokenizer, sessions) {
        this._ort = ort;
        this._sessions = sessions;
        this.spec = spec;
        this.tokenizer = tokenizer;
        const layers = Array.from({ length: spec.num_layers }, (_, i) => i);
        this._pasts = layers.map((i) => `past_key_values.${i}.recurrent_state`);
        this._presents = layers.map((i) => `present.${i}.recurrent_state`);
        for (const [graph, { inputNames, outputNames }] of Object.entries(sessions)) {
            const missing = [
                ...['input_ids', 'positions', 'seq_lens', ...this._pasts].filter((name) => !inputNames.includes(name)),
                ...['logits', ...this._presents].filter((name) => !outputNames.includes(name)),
            ];
            if (missing.length) throw new SampleError(`the ${graph} graph has no ${missing[0]}`);
        }
        // Ids that pad the vocabulary are no tokens: their logits are whatever the padding rows give.
        this.tokens = new Uint8Array(spec.vocab_size);
        for (const id of tokenizer.ids) if (id < spec.vocab_size) this.tokens[id] = 1;
    }

    /** Most tokens that a text may hold. */
    get maxPositions() {
        const { position_embeddings: learned, decay, decay_extended: extended, decay_rows: rows } = this.spec;
        const limits = [MAX_POSITIONS];
        if (learned) limits.push(learned);
        if (decay === 'tables' && !extended) limits.push(rows);
        return Math.min(...limits);
    }

    /** What the model has read of an empty text: float32 [1, H, d, d] a layer. */
    emptyState() {
        const { num_heads: heads, head_dim: size } = this.spec;
        const shape = [1, heads, size, size];
        return this._pasts.map(() => (
            new this._ort.Tensor('float32', new Float32Array(heads * size * size), shape)
        ));
    }

    /**
     * Reads tokens: one by the step graph, several by the prefill graph.
     *
     * @param {number[]} ids at least one.
     * @param {number} position how many tokens the state has read.
     * @param state is not changed.
     * @returns {Promise<{logits: Float32Array, state: object[]}>} logits [V] after the last token, and the new state.
     */
    async read(ids, position, state) {
        const integers = (values, shape) => (
            new this._ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape)
        );
        const feeds = {
            input_ids: integers(ids, [1, ids.length]),
            positions: integers([position], [1]),
            seq_lens: integers([ids.length], [1]),
        };
        this._pasts.forEach((name, i) => { feeds[name] = state[i]; });
        const outputs = await this._sessions[ids.length === 1 ? 'step' : 'prefill'].run(feeds);
        return {
            logits: outputs.logits.data.subarray(-this.spec.vocab_size), // the last token's; `logits` may be all
            state: this._presents.map((name) => outputs[name]),
        };
    }

    /** Token ids of a prompt, at least one. */
    encode(prompt) {
        const ids = this.tokenizer.encode(prompt);
        const { bos_token_id: bos, vocab_size: vocab } = this.spec;
        if (!ids.length && bos !== null && bos < vocab) ids.push(bos);
        if (!ids.length) throw new SampleError('the prompt is empty', 'give at least one character');
        const foreign = ids.find((id) => id >= vocab);
        if (foreign !== undefined) {
            throw new SampleError(`the prompt holds token ${foreign}, which the model does not have`);
        }
        return ids;
    }

    async release() {
        for (const session of Object.values(this._sessions)) await session.release();
    }
}

/** Bytes of a state. They do not depend on how much was read. */
export function stateBytes(state) {
    return state.reduce((sum, tensor) => sum + tensor.data.byteLength, 0);
}

/**
 * Continues a prompt, and gives what came after each token:
 * `{token, text, tokens, promptTokens, promptSeconds, seconds, stateBytes, finish}`. `text` is what has become
 * certain with the token and may be empty; `tokens` counts the new ones; the first comes from the prompt's last
 * call, so `seconds` is the time of `tokens - 1` steps; `finish` is null, 'eos' or 'length' on the last one.
 *
 * @param {Model} model
 * @param {string} prompt
 * @param {{maxTokens?: number, temperature?: number, topK?: number, seed?: number, ignoreEos?: boolean,
 *     pause?: () => Promise<boolean>}} options `temperature` 0 takes the most likely token; `topK` 0 is all;
 *     `pause` is awaited between calls, and ends the text, without another event, if it says false.
 */
export async function* generate(model, prompt, options = {}) {
    const { maxTokens = 128, temperature = 0, topK = 0, seed = 0, ignoreEos = false } = options;
    const pause = options.pause ?? (async () => true);
    checkSampling(maxTokens, temperature, topK, seed);
    const ids = model.encode(prompt);
    if (ids.length + maxTokens - 1 > model.maxPositions) { // the last token is never read
        throw new SampleError(
            `prompt and new tokens are ${ids.length + maxTokens}, and the model knows ${model.maxPositions} positions`,
            'ask for fewer tokens',
        );
    }
    const stream = model.tokenizer.stream();
    for (const id of ids) stream.push(id); // a character may begin in the prompt
    const begun = performance.now();
    let last = { logits: null, state: model.emptyState() };
    let read = 0;
    while (read < ids.length) {
        const piece = ids.slice(read, read + PIECE);
        last = await model.read(piece, read, last.state);
        read += piece.length;
        if (!(await pause())) return;
    }
    const decoding = performance.now();
    for (let tokens = 1; ; tokens += 1) {
        const place = temperature > 0 ? uniform(seed, ids.length + tokens - 1) : 0;
        const token = choose(last.logits, model.tokens, temperature, topK, place);
        const eos = !ignoreEos && model.spec.eos_token_ids.includes(token);
        const finish = eos ? 'eos' : tokens >= maxTokens ? 'length' : null;
        let text = eos ? '' : stream.push(token);
        if (finish) text += stream.finish();
        yield {
            token, text, tokens, finish,
            promptTokens: ids.length,
            promptSeconds: (decoding - begun) / 1000,
            seconds: (performance.now() - decoding) / 1000,
            stateBytes: stateBytes(last.state),
        };
        if (finish || !(await pause())) return;
        last = await model.read([token], read, last.state);
        read += 1;
    }
}

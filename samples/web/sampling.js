// From logits to the next token, as dijiang_engines/sampling.py: the same seed draws the same numbers.

import { SampleError } from './errors.js';

const MASK = (1n << 64n) - 1n;

/** Throws where an option is out of range. */
export function checkSampling(maxTokens, temperature, topK, seed) {
    if (!Number.isSafeInteger(maxTokens) || maxTokens < 1) throw new SampleError('max tokens must be 1 or more');
    if (!Number.isFinite(temperature) || temperature < 0) throw new SampleError('temperature must be 0 or more');
    if (!Number.isSafeInteger(topK) || topK < 0) throw new SampleError('top-k must be 0 (all) or more');
    if (!Number.isSafeInteger(seed)) throw new SampleError('the seed must be a whole number');
}

/**
 * The next token.
 *
 * @param {Float32Array} logits [V].
 * @param {Uint8Array} tokens [V], 0 where an id is no token.
 * @param {number} temperature 0: the most likely token, of equal ones the first.
 * @param {number} topK only so many of the most likely; 0: all.
 * @param {number} place a random number in [0, 1); not used at temperature 0.
 */
export function choose(logits, tokens, temperature, topK, place) {
    let best = -1;
    for (let id = 0; id < logits.length; id += 1) {
        if (Number.isNaN(logits[id]) || logits[id] === Infinity) break;
        if (tokens[id] && logits[id] !== -Infinity && (best < 0 || logits[id] > logits[best])) best = id;
        if (id + 1 === logits.length && best >= 0) {
            return temperature === 0 ? best : draw(kept(logits, tokens, topK), logits, logits[best], temperature, place);
        }
    }
    throw new SampleError('the model gave logits that are not finite', '`dijiang-export validate` says more');
}

/** Ids that may be chosen, ascending: the k largest, and of equal ones the first. */
function kept(logits, tokens, k) {
    const ids = [];
    for (let id = 0; id < logits.length; id += 1) if (tokens[id]) ids.push(id);
    if (!k || k >= ids.length) return ids;
    ids.sort((a, b) => logits[b] - logits[a] || a - b);
    return ids.slice(0, k).sort((a, b) => a - b);
}

/** One id with probability proportional to exp(logit / temperature), by inversion of `place`. */
function draw(ids, logits, most, temperature, place) {
    const sums = [];
    let total = 0;
    for (const id of ids) {
        total += Math.exp((logits[id] - most) / temperature);
        sums.push(total);
    }
    // The first whose sum is beyond the place, so never one of weight zero; rounding may put it at the very end.
    const found = sums.findIndex((sum) => sum > place * total);
    return ids[found >= 0 ? found : sums.indexOf(total)];
}

/**
 * The random number in [0, 1) of a token's place in the text: the upper 53 bits of the first that Philox4x64-10
 * gives with key (seed, 0) and counter (index, 0, 0, 0), as numpy.random.Philox, which raises the counter first.
 *
 * Constants: numpy/numpy@24cbf64cb34df66f9e9e07c5549d9af5cc2ff36d:numpy/random/src/philox/philox.h:20-21,80-91.
 */
export function uniform(seed, index) {
    let [a, b, c, d] = [(BigInt(index) + 1n) & MASK, 0n, 0n, 0n];
    let [first, second] = [BigInt.asUintN(64, BigInt(seed)), 0n];
    for (let round = 0; round < 10; round += 1) {
        const left = 0xD2E7470EE14C6C93n * a;
        const right = 0xCA5A826395121157n * c;
        [a, b, c, d] = [(right >> 64n) ^ b ^ first, right & MASK, (left >> 64n) ^ d ^ second, left & MASK];
        first = (first + 0x9E3779B97F4A7C15n) & MASK;
        second = (second + 0xBB67AE8584CAA73Bn) & MASK;
    }
    return Number(a >> 11n) * 2 ** -53;
}

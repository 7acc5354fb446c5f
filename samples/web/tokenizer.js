// Byte-level BPE from tokenizer.json: text to token ids, and token ids to text as they come.
//
// What tokenizers 0.23's library does, for the parts that are named here. A file with any other part is refused:
// nearly the same tokens would give a worse text, and nobody would see why.

import { SampleError } from './errors.js';

// GPT-2's pattern (huggingface/tokenizers, ByteLevel with use_regex). White space is Unicode's property, as
// in that library; JavaScript's \s has U+FEFF too, and not U+0085.
const WORDS = new RegExp(
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+"
        + '|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+',
    'gu',
);

const NORMALIZERS = new Set(['NFC', 'NFD', 'NFKC', 'NFKD']);

function unknown(what) {
    return new SampleError(
        `this page does not know the bundle's tokenizer: ${what}`,
        'it knows byte-level BPE; `dijiang-export generate` knows them all',
    );
}

/** Printable characters for the 256 bytes, as GPT-2 chose them: a byte that prints stands for itself. */
function byteCharacters() {
    const prints = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    let next = 256;
    return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(prints(b) ? b : next++));
}

const BYTE_CHARACTERS = byteCharacters();
const CHARACTER_BYTES = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));

export class Tokenizer {
    /** @param {object} file tokenizer.json as parsed. */
    constructor(file) {
        const model = file?.model;
        if (model?.type !== 'BPE') throw unknown(`its model is ${shown(model?.type)}, not BPE`);
        for (const key of ['dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix']) {
            if (model[key]) throw unknown(`its model has ${key}`);
        }
        if (model.byte_fallback) throw unknown('its model has byte_fallback');
        if (file.decoder?.type !== 'ByteLevel') throw unknown('its decoder is not ByteLevel');
        this._normalizers = normalizers(file.normalizer);
        this._splitters = splitters(file.pre_tokenizer);
        this._readVocabulary(model);
        this._readMerges(model);
        this._readAdded(file.added_tokens ?? []);
        [this._before, this._after] = this._template(file.post_processor ?? null);
    }

    /** All ids that are tokens. */
    get ids() {
        return this._names.keys();
    }

    /** Token ids of a text, with those that the tokenizer puts around it. */
    encode(text) {
        if (!text.isWellFormed()) throw new SampleError('the prompt holds half a surrogate pair');
        const ids = [...this._before];
        for (const raw of cut(text, this._rawAdded)) {
            if (raw.id !== undefined) {
                ids.push(raw.id);
                continue;
            }
            const normal = this._normalized(raw.text);
            for (const part of cut(normal, this._normalAdded)) {
                if (part.id !== undefined) ids.push(part.id);
                else this._encodePart(part.text, ids);
            }
        }
        ids.push(...this._after);
        return ids;
    }

    /** A stream of text: `push(id)` gives what is certain of it, `finish()` the rest; half a character never. */
    stream() {
        const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
        return {
            push: (id) => decoder.decode(this._bytes(id), { stream: true }),
            finish: () => decoder.decode(),
        };
    }

    _readVocabulary(model) {
        this._vocabulary = new Map(Object.entries(model.vocab ?? {}));
        this._names = new Map();
        for (const [name, id] of this._vocabulary) {
            if (!Number.isSafeInteger(id) || id < 0) throw unknown(`the id of ${shown(name)} is no number`);
            this._names.set(id, name);
        }
        const missing = BYTE_CHARACTERS.findIndex((character) => !this._vocabulary.has(character));
        if (missing >= 0) throw unknown(`it has no token for byte ${missing}`);
        this._ignoreMerges = Boolean(model.ignore_merges);
    }

    /** (left id, right id) to rank and product. */
    _readMerges(model) {
        if (!Array.isArray(model.merges)) throw unknown('it has no merges');
        this._size = 1 + largest(this._names.keys());
        this._merges = new Map();
        const lastMade = new Map();
        const used = [];
        model.merges.forEach((merge, rank) => {
            const pair = typeof merge === 'string' ? merge.split(' ') : merge;
            const [left, right, made] = Array.isArray(pair) && pair.length === 2
                ? [...pair, pair.join('')].map((name) => this._vocabulary.get(name)) : [];
            if (left === undefined || right === undefined || made === undefined) {
                throw unknown(`merge ${rank} is not of two tokens to a third`);
            }
            this._merges.set(left * this._size + right, { rank, made });
            lastMade.set(made, rank);
            used.push(left, right);
        });
        // `merged` does all places of a pair at once, which is right only if what is made merges later.
        used.forEach((id, at) => {
            if ((lastMade.get(id) ?? -1) >= at >> 1) throw unknown(`merge ${at >> 1} comes before its parts`);
        });
    }

    _readAdded(added) {
        this._skipped = new Set();
        const raw = new Map();
        const normal = new Map();
        for (const token of added) {
            if (typeof token.content !== 'string' || token.content === '' || !Number.isSafeInteger(token.id)) {
                throw unknown('an added token has no text or id');
            }
            if (token.single_word || token.lstrip || token.rstrip) {
                throw unknown(`the added token ${shown(token.content)} takes text beside it`);
            }
            if (token.normalized && this._normalizers.length && token.content !== this._normalized(token.content)) {
                throw unknown(`the added token ${shown(token.content)} is normalized`);
            }
            this._names.set(token.id, token.content);
            this._vocabulary.set(token.content, token.id);
            if (token.special) this._skipped.add(token.id);
            (token.normalized ? normal : raw).set(token.content, token.id);
        }
        this._rawAdded = matcher(raw);
        this._normalAdded = matcher(normal);
    }

    _normalized(text) {
        return this._normalizers.reduce((value, form) => value.normalize(form), text);
    }

    /** Ids before and after a text. */
    _template(processor) {
        if (processor === null || processor.type === 'ByteLevel') return [[], []];
        if (processor.type !== 'TemplateProcessing' || !Array.isArray(processor.single)) {
            throw unknown(`its post-processor is ${shown(processor.type)}`);
        }
        const around = [[], []];
        let side = 0;
        for (const piece of processor.single) {
            if (piece.Sequence !== undefined) side += 1;
            else around[Math.min(side, 1)].push(...(processor.special_tokens?.[piece.SpecialToken?.id]?.ids ?? []));
        }
        if (side !== 1 || !around.flat().every((id) => this._names.has(id))) {
            throw unknown('its template is not a text with tokens around it');
        }
        return around;
    }

    _encodePart(text, ids) {
        let parts = [text];
        for (const split of this._splitters) parts = parts.flatMap(split).filter((part) => part !== '');
        for (const part of parts) {
            const characters = Array.from(new TextEncoder().encode(part), (byte) => BYTE_CHARACTERS[byte]);
            const whole = this._ignoreMerges ? this._vocabulary.get(characters.join('')) : undefined;
            if (whole !== undefined) ids.push(whole);
            else for (const id of this._merged(characters.map((c) => this._vocabulary.get(c)))) ids.push(id);
        }
    }

    /** The ids of a word's bytes, merged: the pair of the lowest rank first, everywhere from the left. */
    _merged(word) {
        while (word.length > 1) {
            let best = null;
            let key = -1;
            for (let i = 0; i + 1 < word.length; i += 1) {
                const pair = word[i] * this._size + word[i + 1];
                const merge = this._merges.get(pair);
                if (merge !== undefined && (best === null || merge.rank < best.rank)) [best, key] = [merge, pair];
            }
            if (best === null) break;
            const next = [];
            for (let i = 0; i < word.length; i += 1) {
                const found = i + 1 < word.length && word[i] * this._size + word[i + 1] === key;
                next.push(found ? best.made : word[i]);
                if (found) i += 1;
            }
            word = next;
        }
        return word;
    }

    /** The bytes that a token adds to a text; none for special tokens and ids that are no tokens. */
    _bytes(id) {
        const name = this._names.get(id);
        if (name === undefined || this._skipped.has(id)) return new Uint8Array();
        const bytes = Array.from(name, (character) => CHARACTER_BYTES.get(character));
        return bytes.includes(undefined) ? new TextEncoder().encode(name) : Uint8Array.from(bytes);
    }
}

function shown(value) {
    return JSON.stringify(value)?.slice(0, 60) ?? 'missing';
}

function largest(values) {
    let most = -1;
    for (const value of values) most = Math.max(most, value); // Math.max(...values) takes only so many
    return most;
}

function sequence(stage, key) {
    if (stage === null || stage === undefined) return [];
    return stage.type === 'Sequence' ? (stage[key] ?? []).flatMap((one) => sequence(one, key)) : [stage];
}

function normalizers(stage) {
    return sequence(stage, 'normalizers').map(({ type }) => {
        if (!NORMALIZERS.has(type)) throw unknown(`its normalizer is ${shown(type)}`);
        return type;
    });
}

/** Functions from a piece of text to its pieces, one after another. */
function splitters(stage) {
    const stages = sequence(stage, 'pretokenizers');
    if (stages.at(-1)?.type !== 'ByteLevel' || stages.filter((one) => one.type === 'ByteLevel').length > 1) {
        throw unknown('its pre-tokenizer does not end in ByteLevel');
    }
    return stages.map(splitter);
}

function splitter(stage) {
    if (stage.type === 'ByteLevel') {
        const words = stage.use_regex === false ? (text) => [text] : (text) => text.match(WORDS) ?? [];
        return stage.add_prefix_space ? (text) => words(text.startsWith(' ') ? text : ` ${text}`) : words;
    }
    if (stage.type === 'Digits') {
        const digits = stage.individual_digits ? /(\p{N})/u : /(\p{N}+)/u;
        return (text) => text.split(digits);
    }
    const pattern = stage.pattern?.String;
    if (stage.type === 'Split' && pattern && stage.behavior === 'Isolated' && !stage.invert) {
        return (text) => text.split(pattern).flatMap((piece, i) => (i ? [pattern, piece] : [piece]));
    }
    throw unknown(`its pre-tokenizer has ${shown(stage.type)} of another kind`);
}

/** A pattern for added tokens, the longest first; null if there are none. */
function matcher(tokens) {
    if (!tokens.size) return null;
    const longest = [...tokens.keys()].sort((a, b) => b.length - a.length);
    const escaped = longest.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'));
    return { pattern: new RegExp(escaped.join('|'), 'gu'), tokens };
}

/** A text as added tokens, with their ids, and what is between them. */
function* cut(text, added) {
    let at = 0;
    for (const match of added === null ? [] : text.matchAll(added.pattern)) {
        if (match.index > at) yield { text: text.slice(at, match.index) };
        yield { id: added.tokens.get(match[0]) };
        at = match.index + match[0].length;
    }
    if (at < text.length) yield { text: text.slice(at) };
}

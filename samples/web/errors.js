// What went wrong, in one line, and what to do about it. Everything else that is thrown is a mistake in the program.

export class SampleError extends Error {
    /** @param {string} what the message; @param {string} hint what to do, may be empty. */
    constructor(what, hint = '') {
        super(what);
        this.name = 'SampleError';
        this.hint = hint;
    }
}

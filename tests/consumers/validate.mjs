// Prints what AsyncAPI's own parser has to say of a document as JSON: its problems and the ids of its messages.
import { Parser, fromFile } from "@asyncapi/parser";

const { document, diagnostics } = await fromFile(new Parser(), process.argv[2]).parse();
const problems = diagnostics.map(({ code, message, path, severity }) => ({ code, message, path: path.join("/"), severity }));
const messages = document?.allMessages().all().map((message) => message.id()) ?? [];
console.log(JSON.stringify({ problems, messages }));

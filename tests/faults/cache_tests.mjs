// Runs the npm package http-cache-tests against a cache: node cache_tests.mjs PACKAGE_DIRECTORY
// Prints the port of its origin; reads, as one line of JSON, {"base": the cache's URL of that origin, "ids": of the tests, or
// null for all}; prints {id: [kind, what is wrong or null]}. Configuration and results go to the origin itself, since a mirror
// takes no PUT; what is tested goes through the cache.
import http from 'node:http'
import path from 'node:path'
import readline from 'node:readline'
import { pathToFileURL } from 'node:url'

const of = name => import(pathToFileURL(path.join(process.argv[2], name)))
const handlers = {
  config: (await of('server/handle-config.mjs')).default,
  state: (await of('server/handle-state.mjs')).default,
  test: (await of('server/handle-test.mjs')).default
}
const { runTests, getResults } = await of('client/runner.mjs')
const suites = [...(await of('tests/index.mjs')).default, (await of('tests/surrogate-control.mjs')).default]
const fetch = (await of('../node-fetch/lib/index.js')).default
const say = console.log
console.log = console.error = () => {}

const origin = http.createServer((request, response) => {
  const [, word, ...rest] = request.url.split('?')[0].split('/')
  handlers[word](rest, request, response)
})
await new Promise(resolve => origin.listen(0, '127.0.0.1', resolve))
const own = `http://127.0.0.1:${origin.address().port}`
say(origin.address().port)

const lines = readline.createInterface({ input: process.stdin })
const { base, ids } = JSON.parse((await lines[Symbol.asyncIterator]().next()).value)
const wanted = suites.map(suite => ({ ...suite, tests: suite.tests.filter(test => !ids || ids.includes(test.id)) }))
const direct = url => /^\/(config|state)\//.test(url.slice(base.length)) ? own + url.slice(base.length) : url
await runTests(wanted, (url, init) => fetch(direct(url), init), false, base, 1000)

const kinds = Object.fromEntries(wanted.flatMap(suite => suite.tests.map(test => [test.id, test.kind || 'required'])))
const told = Object.entries(getResults()).map(([id, it]) => [id, [kinds[id], it === true ? null : it.join(': ')]])
say(JSON.stringify(Object.fromEntries(told)))
process.exit(0)

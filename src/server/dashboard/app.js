// The dashboard. All text goes into the page as text nodes: what agents say is never read as HTML.

const $ = (id) => document.getElementById(id);
const VIEWS = { agents: 'Agents', now: 'Now', memory: 'Memory and disk', requests: 'Requests', connect: 'Connect', chat: 'Chat' };
const POLL_MS = { now: 1000, agents: 5000, memory: 5000, requests: 5000 };

// ---- the page ----

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value == null) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false).map((c) => (c instanceof Node ? c : String(c))));
  return element;
}

const button = (text, act, attributes = {}) =>
  el('button', { type: 'button', ...attributes, onclick: async (event) => {
    const pressed = event.currentTarget;
    pressed.disabled = true;
    try {
      await act(pressed);
    } catch (error) {
      tell(error.message, true);
    } finally {
      pressed.disabled = false;
    }
  } }, text);

function table(caption, heads, rows, empty = 'None.') {
  if (!rows.length) return el('p', { class: 'soft' }, caption, ': ', empty);
  const number = (cell) => (typeof cell === 'number' ? 'number' : null);
  return el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': caption },
    el('table', {}, el('caption', {}, caption),
      el('thead', {}, el('tr', {}, heads.map((head, i) => el('th', { scope: 'col', class: number(rows[0][i]) }, head)))),
      el('tbody', {}, rows.map((row) => el('tr', {}, row.map((cell, i) =>
        i === 0 ? el('th', { scope: 'row' }, cell) : el('td', { class: number(cell) }, typeof cell === 'number' ? cell.toLocaleString() : cell)))))));
}

function tell(text, alarm = false) {
  $('notice').className = alarm ? 'alarm' : '';
  $('notice').textContent = text;
}

function size(bytes) {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; ++unit) bytes /= 1000;
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const clock = (ms) => new Date(ms).toLocaleTimeString();

/** A bar of parts, each [class, amount, label]; `most` is the amount of a full bar. */
function bar(parts, most) {
  const label = parts.map(([, amount, name]) => `${amount.toLocaleString()} ${name}`).join(', ');
  return el('div', { class: 'bar', role: 'img', 'aria-label': label, title: label }, parts.map(([kind, amount]) => {
    const part = el('span', { class: kind });
    part.style.width = `${most > 0 ? (100 * amount) / most : 0}%`;
    return part;
  }));
}

const legend = (...keys) => el('p', { class: 'soft' }, keys.map(([kind, name]) => [el('span', { class: `key ${kind}`, 'aria-hidden': 'true' }), name, '  ']));

// ---- the server ----

const key = () => sessionStorage.getItem('torpor-key') ?? '';

async function ask(method, path, body, more = {}) {
  const headers = key() ? { authorization: `Bearer ${key()}` } : {};
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), ...more });
  if (response.ok) return response;
  if (response.status === 401) throw Object.assign(new Error('This server asks for a key.'), { signIn: true });
  let said = `${response.status} ${response.statusText}`;
  try {
    const { error } = await response.json();
    said = error.message ?? error;
  } catch { /* no JSON: the status says it */ }
  throw new Error(said);
}

const get = async (path) => (await ask('GET', path)).json();
const post = async (path, body) => (await ask('POST', path, body)).json();
const agentPath = (name, action = '') => `/torpor/v1/agents/${encodeURIComponent(name)}${action && `/${action}`}`;
const isKnown = async (name) => (await get('/torpor/v1/agents')).agents.some((agent) => agent.agent === name);
const agentLink = (name) => (name ? el('a', { href: `#agent/${encodeURIComponent(name)}` }, name) : el('span', { class: 'soft' }, 'no name'));

/** Events of a streamed answer: calls hear(event, data) for each. */
async function stream(path, body, hear, signal) {
  const reader = (await ask('POST', path, { ...body, stream: true }, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf('\n\n')) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split('\n');
      const of = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (of('data')) hear(of('event'), JSON.parse(of('data')));
    }
  }
}

// ---- views: each gives what the page shows ----

const view = {};

view.agents = async () => {
  const { agents } = await get('/torpor/v1/agents');
  return [el('h2', {}, 'Agents'), table('Agents', ['Agent', 'State', 'Tokens', 'Memory', 'Disk', 'Actions'], agents.map((agent) => [
    agentLink(agent.agent),
    [agent.in_turn ? 'in a turn' : agent.awake ? 'awake' : 'asleep', agent.pinned && ', pinned', agent.unsaved && ', unsaved'].filter(Boolean).join(''),
    agent.tokens, size(agent.memory_bytes), size(agent.disk_bytes),
    el('span', { class: 'row' },
      agent.awake
        ? button('Sleep', () => act(agent.agent, 'sleep'), { 'aria-label': `Sleep ${agent.agent}` })
        : button('Wake', () => act(agent.agent, 'wake'), { 'aria-label': `Wake ${agent.agent}` }),
      button(agent.pinned ? 'Unpin' : 'Pin', () => act(agent.agent, 'pin', { pinned: !agent.pinned }), { 'aria-label': `${agent.pinned ? 'Unpin' : 'Pin'} ${agent.agent}` })),
  ]), 'there are none yet; Chat makes one.')];
};

async function act(agent, action, body) {
  await post(agentPath(agent, action), body);
  tell(`${agent}: ${action} is done.`);
  await show();
}

view.agent = async (name) => {
  const [agent, { requests }] = await Promise.all([get(agentPath(name)), get('/torpor/v1/requests')]);
  const map = await get(agentPath(name, 'map')).catch(() => null); // not saved yet
  const turns = requests.filter((turn) => turn.agent === name);
  const most = Math.max(1, ...turns.map((turn) => turn.prompt_tokens + turn.generated_tokens));
  const asked = (id, label, value, type = 'text') => el('label', {}, label, el('input', { id, type, value, required: true, min: type === 'number' ? 0 : null }));
  const form = (action, label, fields, done) => el('form', { onsubmit: async (event) => {
    event.preventDefault();
    try {
      await done(...[...event.currentTarget.elements].filter((field) => field.tagName === 'INPUT').map((field) => field.value));
    } catch (error) {
      tell(error.message, true);
    }
  } }, fields, el('button', {}, label));
  return [
    el('h2', {}, `Agent ${name}`),
    el('p', {}, `${agent.tokens.toLocaleString()} tokens, ${agent.awake ? 'awake' : 'asleep'}, ${size(agent.memory_bytes)} in memory, ${size(agent.disk_bytes)} on disk`,
      map ? `, ${size(map.own_bytes)} of them its own.` : '; not saved yet.'),
    el('div', { class: 'row' },
      el('a', { href: `#chat/${encodeURIComponent(name)}` }, 'Chat with it'),
      agent.awake ? button('Sleep', () => act(name, 'sleep')) : button('Wake', () => act(name, 'wake')),
      button(agent.pinned ? 'Unpin' : 'Pin', () => act(name, 'pin', { pinned: !agent.pinned })),
      button('Export', () => download(name)),
      button('Delete', async () => {
        if (!confirm(`Delete agent ${name} from memory and disk?`)) return;
        await ask('DELETE', agentPath(name));
        tell(`${name} is deleted.`);
        location.hash = 'agents';
      })),
    form('fork', 'Fork', [asked('fork-as', 'New agent', `${name}-fork`), asked('fork-at', 'Its first tokens', agent.tokens, 'number')], async (as, at) => {
      await post(agentPath(name, 'fork'), { as, at_token: Number(at) });
      location.hash = `agent/${encodeURIComponent(as)}`;
    }),
    form('rewind', 'Rewind', [asked('rewind-to', 'Tokens to keep', agent.tokens, 'number')], (tokens) => act(name, 'rewind', { tokens: Number(tokens) })),
    form('rename', 'Rename', [asked('rename-to', 'New name', name)], async (to) => {
      await post(agentPath(name, 'rename'), { to });
      location.hash = `agent/${encodeURIComponent(to)}`;
    }),
    el('h3', {}, 'Turns since the server began'),
    legend(['cached', 'cached'], ['computed', 'computed'], ['answer', 'generated']),
    table('Turns, the newest first', ['Begun', 'Tokens', 'Cached', 'Computed', 'Generated', 'Missed at'], turns.map((turn) => {
      const computed = Math.max(0, turn.prompt_tokens - turn.cached_tokens);
      return [clock(turn.begun_at_ms),
        bar([['cached', turn.cached_tokens, 'cached'], ['computed', computed, 'computed'], ['answer', turn.generated_tokens, 'generated']], most),
        turn.cached_tokens, computed, turn.generated_tokens, turn.missed];
    })),
    map && [
      el('h3', {}, 'Segments'),
      el('p', { class: 'soft' }, `${map.segment_tokens} tokens each; a thick border: others begin with it too.`),
      el('ol', { class: 'map' }, map.segments.map((segment, i) => el('li', { class: segment.shared_with.length ? 'shared' : null,
        title: `${segment.name}${segment.shared_with.length ? `; shared with ${segment.shared_with.join(', ')}` : ''}` },
        i + 1, segment.shared_with.length ? ` (${segment.shared_with.length})` : ''))),
      table('Branches: agents that begin alike', ['Agent', 'Tokens', 'In common'], map.branches.map((branch) => [agentLink(branch.agent), branch.tokens, branch.common_tokens])),
      el('h3', {}, 'Conversation'),
      el('ol', { class: 'talk' }, map.messages.map(({ begin, end, message }) => said(message?.role ?? '', message?.content ?? '', `tokens ${begin} to ${end}`))),
    ],
  ];
};

const said = (role, text, note = '') => el('li', { class: role }, el('b', {}, [role, note].filter(Boolean).join(', ')), text);

async function download(name) {
  const file = await (await ask('GET', agentPath(name, 'export'))).blob();
  const link = el('a', { href: URL.createObjectURL(file), download: `${name}.safetensors` });
  link.click();
  URL.revokeObjectURL(link.href);
  tell(`${name} is exported: ${size(file.size)}.`);
}

view.now = async () => {
  const now = await get('/torpor/v1/now');
  const waiting = now.turns.filter((turn) => turn.state === 'waiting');
  return [
    el('h2', {}, 'Now'),
    el('p', {}, `${now.model.name}: ${now.turns.length - waiting.length} turns run, ${waiting.length} wait`, now.others ? `; ${now.others} of others.` : '.'),
    table('Turns under way', ['Agent', 'State', 'Since', 'Prompt', 'Cached', 'Prompt read'], now.turns.map((turn) => [
      agentLink(turn.agent), turn.state === 'waiting' ? `waiting, place ${waiting.indexOf(turn) + 1}` : turn.state, clock(turn.begun_at_ms),
      turn.prompt_tokens, turn.cached_tokens,
      turn.state === 'waiting' ? '' : bar([['computed', turn.done, `of ${turn.total} tokens read`]], turn.total),
    ])),
    el('h3', {}, 'Since the server began'),
    table('Work', ['What', 'How much'], [
      ['Forward passes', now.work.passes], ['Most turns in one pass', now.work.most_turns], ['Tokens of prompts computed', now.work.prompt_tokens],
      ['Tokens of answers computed', now.work.answer_tokens], ['Of those, guessed', now.work.accepted_tokens],
      ['Guessed wrongly', now.work.rejected_tokens], ['Turns put aside for memory', now.work.put_aside]]),
  ];
};

view.memory = async () => {
  const { disk, agents, ...memory } = await get('/torpor/v1/memory');
  return [
    el('h2', {}, 'Memory and disk'),
    table('Memory', ['What', 'How much'], [
      ['Model', size(memory.model_bytes)], ['Agents\u2019 caches', size(memory.kv_bytes)], ['of those, mapped files', size(memory.mapped_bytes)],
      ['Budget', memory.budget_bytes ? size(memory.budget_bytes) : 'none'], ['Waiting to be written', size(memory.queued_bytes)], ['Evictions', memory.evictions.toLocaleString()]]),
    memory.budget_bytes > 0 && bar([['cached', memory.kv_bytes, 'bytes of the budget']], memory.budget_bytes),
    table('Agents in memory', ['Agent', 'Tokens', 'Holds', 'Shared'], agents.map((agent) => [agentLink(agent.agent), agent.tokens, size(agent.bytes), size(agent.shared_bytes)])),
    table('Disk', ['What', 'How much'], [
      ['All files', size(disk.total_bytes)], ['Agents', `${disk.agents.toLocaleString()}, ${size(disk.agent_bytes)}`],
      ['Segments', `${disk.segments.toLocaleString()}, ${size(disk.segment_bytes)}`], ['Segments that no agent names', `${disk.orphan_segments.toLocaleString()}, ${size(disk.orphan_bytes)}`],
      ['Budget', disk.budget_bytes ? size(disk.budget_bytes) : 'none'], ['Kept free', size(disk.min_free_bytes)]]),
  ];
};

view.requests = async () => {
  const { requests } = await get('/torpor/v1/requests');
  return [el('h2', {}, 'Requests'),
    table('Turns that ended, the newest first', ['Begun', 'Agent', 'End', 'Queue and wake', 'Prompt', 'Answer', 'Cached', 'Computed', 'Generated', 'Missed at'],
      requests.map((turn) => [clock(turn.begun_at_ms), agentLink(turn.agent), turn.reason, seconds(turn.waited_ms), seconds(turn.read_ms),
        seconds(turn.answered_ms), turn.cached_tokens, Math.max(0, turn.prompt_tokens - turn.cached_tokens), turn.generated_tokens, turn.missed]))];
};

view.connect = async () => {
  const { data } = await get('/v1/models');
  const model = data[0].id;
  const base = location.origin;
  const message = [{ role: 'user', content: 'Hi.' }];
  const clients = [
    ['OpenAI\u2019s SDKs', `export OPENAI_BASE_URL=${base}/v1 OPENAI_API_KEY=KEY\n# model: ${model}`, '/v1/chat/completions', { model, max_tokens: 1, messages: message }],
    ['Anthropic\u2019s SDKs and Claude Code', `export ANTHROPIC_BASE_URL=${base} ANTHROPIC_AUTH_TOKEN=KEY ANTHROPIC_MODEL=${model}`, '/v1/messages', { model, max_tokens: 1, messages: message }],
    ['Codex: ~/.codex/config.toml', `model = "${model}"\nmodel_provider = "torpor"\n\n[model_providers.torpor]\nname = "Torpor"\nbase_url = "${base}/v1"\nenv_key = "OPENAI_API_KEY"\nwire_api = "responses"`,
      '/v1/responses', { model, max_output_tokens: 16, input: 'Hi.' }],
    ['Ollama\u2019s clients', `export OLLAMA_HOST=${base}\n# the key goes in the header "authorization: Bearer KEY"`, '/api/chat', { model, stream: false, options: { num_predict: 1 }, messages: message }],
    ['curl', `curl -s ${base}/v1/chat/completions -H "authorization: Bearer KEY" -d '${JSON.stringify({ model, messages: message })}'`, '/v1/chat/completions', { model, max_tokens: 1, messages: message }],
  ];
  return [el('h2', {}, 'Connect'), el('p', {}, 'KEY stands for your key.'), clients.map(([name, text, path, body]) => {
    const outcome = el('span', { role: 'status' });
    return el('section', { 'aria-label': name }, el('h3', {}, name), el('pre', { tabindex: '0' }, text), el('div', { class: 'row' },
      button('Copy with key', async () => {
        await navigator.clipboard.writeText(text.replace(/\bKEY\b/g, key() || 'none'));
        tell('Copied.');
      }, { 'aria-label': `Copy with key: ${name}` }),
      button('Test', async () => {
        outcome.textContent = 'asking\u2026';
        const begin = performance.now();
        try {
          await post(path, body);
          outcome.textContent = `It answers at ${path}, in ${seconds(performance.now() - begin)}.`;
        } catch (error) {
          outcome.textContent = `It fails: ${error.message}`;
        }
      }, { 'aria-label': `Test: ${name}` }), outcome));
  })];
};

view.chat = async (name = '') => {
  const talk = el('ol', { class: 'talk', 'aria-live': 'polite', 'aria-label': 'Conversation' });
  const agent = el('input', { id: 'chat-agent', value: name || 'ada', required: true, autocomplete: 'off' });
  const prompt = el('textarea', { id: 'chat-prompt', rows: 3, required: true });
  const most = el('input', { id: 'chat-most', type: 'number', min: 1, value: 256 });
  const send = el('button', {}, 'Send');
  let running = null;
  const stop = button('Stop', () => running?.abort());
  stop.hidden = true;
  const load = async () => {
    const map = (await isKnown(agent.value)) ? await get(agentPath(agent.value, 'map')) : { messages: [] };
    talk.replaceChildren(...map.messages.map(({ message }) => said(message?.role ?? '', message?.content ?? '')));
  };
  const form = el('form', { onsubmit: async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    send.disabled = true;
    stop.hidden = false;
    const answer = said('assistant', '');
    const text = document.createTextNode('');
    answer.append(text);
    talk.append(said('user', prompt.value), answer);
    const body = { prompt: prompt.value, max_tokens: Number(most.value) };
    try {
      const known = await isKnown(agent.value);
      await stream(known ? agentPath(agent.value, 'turn') : '/torpor/v1/agents', known ? body : { agent: agent.value, ...body }, (event, data) => {
        if (event === 'text') text.data += data.text;
        if (event === 'prefill') tell(`Reading: ${data.done} of ${data.total} tokens.`);
        if (event === 'result') tell(`${data.tokens.cached} tokens cached, ${data.tokens.prefilled} computed, ${data.tokens.generated} generated.`);
        if (event === 'error') tell(data.error.message, true);
      }, running.signal);
      prompt.value = '';
    } catch (error) {
      tell(error.name === 'AbortError' ? 'The turn is taken back.' : error.message, error.name !== 'AbortError');
      await load();
    } finally {
      running = null;
      send.disabled = false;
      stop.hidden = true;
      prompt.focus();
    }
  } },
    el('label', {}, 'Agent', agent), el('label', {}, 'Longest answer', most), el('label', { class: 'wide' }, 'Message', prompt), send, stop);
  agent.addEventListener('change', load);
  await load();
  return [el('h2', {}, 'Chat'), talk, form];
};

// ---- signing in, and from view to view ----

function signIn() {
  $('leave').hidden = true;
  const field = el('input', { id: 'key', type: 'password', autocomplete: 'off', required: true });
  $('view').replaceChildren(el('h2', {}, 'Sign in'),
    el('p', {}, 'The link that ', el('code', {}, 'torpor serve'), ' prints signs in. Or give a key of the server\u2019s:'),
    el('form', { onsubmit: (event) => {
      event.preventDefault();
      sessionStorage.setItem('torpor-key', field.value.trim());
      show();
    } }, el('label', { class: 'wide' }, 'Key', field), el('button', {}, 'Sign in')));
}

/** Takes the key of the link out of the address, so that no history or screenshot has it. */
function takeKey() {
  const found = /^#key=(.+)$/.exec(location.hash);
  if (!found) return;
  sessionStorage.setItem('torpor-key', decodeURIComponent(found[1]));
  history.replaceState(null, '', `${location.pathname}#agents`);
}

let shown = 0;
let timer = 0;

async function show() {
  takeKey();
  clearTimeout(timer);
  const mine = ++shown;
  const [name, argument] = location.hash.slice(1).split('/');
  const here = view[name] ? name : 'agents';
  for (const link of $('nav').children) {
    if (link.hash === `#${here === 'agent' ? 'agents' : here}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  document.title = `${VIEWS[here] ?? argument} \u2013 Torpor`;
  try {
    const content = await view[here](argument && decodeURIComponent(argument));
    if (mine !== shown) return;
    $('leave').hidden = !key();
    $('view').replaceChildren(...[content].flat(Infinity).filter(Boolean));
  } catch (error) {
    if (mine !== shown) return;
    if (error.signIn) return signIn();
    tell(error.message, true);
    if (!$('view').childElementCount) $('view').replaceChildren(el('h2', {}, VIEWS[here] ?? 'Agent'), el('p', {}, error.message));
  }
  if (POLL_MS[here]) timer = setTimeout(refresh, POLL_MS[here]);
}

/** Again, unless nobody looks or somebody stands on a button that would go. */
function refresh() {
  const busy = $('view').contains(document.activeElement) && document.activeElement !== $('view');
  if (document.hidden || busy) timer = setTimeout(refresh, 1000);
  else show();
}

$('nav').append(...Object.entries(VIEWS).map(([name, title]) => el('a', { href: `#${name}` }, title)));
$('leave').addEventListener('click', () => {
  sessionStorage.removeItem('torpor-key');
  signIn();
});
$('skip').addEventListener('click', (event) => {
  event.preventDefault();
  $('view').focus();
});
addEventListener('hashchange', () => {
  tell('');
  show();
});
show();

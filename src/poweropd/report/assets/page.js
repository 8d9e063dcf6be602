'use strict';
(() => {
const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const idle = window.requestIdleCallback ?? (work => setTimeout(work, 30));

// --- theme: the system's until the reader chooses -------------------------------------------------------------------
const system = matchMedia('(prefers-color-scheme: dark)');
const button = document.getElementById('theme');
const isDark = () => (root.dataset.theme ?? (system.matches ? 'dark' : 'light')) === 'dark';

function themeChanged() {
  button.textContent = isDark() ? 'Light theme' : 'Dark theme';
  redraw();
}
button.hidden = false;
button.addEventListener('click', () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
  try { localStorage.setItem('poweropd-theme', root.dataset.theme); } catch { /* a page from a file may have no storage */ }
  themeChanged();
});
system.addEventListener('change', themeChanged);

// --- plots ----------------------------------------------------------------------------------------------------------
const plots = all('.plot').map(div => ({
  div, spec: JSON.parse(div.nextElementSibling.textContent), drawn: false, stale: true, near: false,
}));
for (const {div, spec} of plots) {  // the legend takes what height it needs, and the axes keep theirs
  const names = spec.layout.showlegend ? spec.traces.filter(trace => trace.showlegend !== false).map(trace => trace.name) : [];
  const columns = Math.max(1, Math.floor((div.clientWidth - 80) / (50 + 6.5 * Math.max(0, ...names.map(name => name.length)))));
  spec.layout.height += 20 * Math.ceil(names.length / columns);
  div.style.height = `${spec.layout.height}px`;
}
const hidden = new Set();
const touch = matchMedia('(pointer: coarse)').matches;
const config = {
  displaylogo: false, responsive: true, doubleClick: 'reset',
  modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', 'toImage']],
};

/** The colour of a variable of the style sheet, as the present theme has it. */
function ink(name) {
  root.style.setProperty('outline-color', `var(--${name})`);
  const value = getComputedStyle(root).outlineColor;
  root.style.removeProperty('outline-color');
  return value;
}

const looks = {};
const template = () => looks[isDark()] ??= look();

function look() {
  const axis = {
    gridcolor: ink('line'), zerolinecolor: ink('line'), linecolor: ink('line'), automargin: true,
    exponentformat: 'power', title: {standoff: 8, font: {size: 12, color: ink('soft')}}, tickfont: {color: ink('soft')},
  };
  return {
    layout: {
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', dragmode: touch ? false : 'zoom',
      font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: ink('ink')},
      xaxis: {...axis, zeroline: false}, yaxis: axis,
      hoverlabel: {bgcolor: ink('raised'), bordercolor: ink('line'), font: {color: ink('ink')}, namelength: -1},
      modebar: {bgcolor: 'rgba(0,0,0,0)', color: ink('soft'), activecolor: ink('ink')},
    },
    data: {heatmap: [{colorscale: [[0, ink('down')], [.5, ink('none')], [1, ink('up')]],
      colorbar: {tickfont: {color: ink('soft')}}}]},
  };
}

function draw(plot) {
  const {div, spec} = plot;
  const visible = spec.traces.map(trace => hidden.has(trace.meta) ? 'legendonly' : true);
  if (plot.drawn) {
    Plotly.update(div, {visible}, {template: template()});
  } else {
    const traces = spec.traces.map((trace, index) => ({...trace, visible: visible[index]}));
    const images = {toImageButtonOptions: {format: 'svg', filename: div.parentElement.id}};
    Plotly.newPlot(div, traces, {...spec.layout, template: template()}, {...config, ...images});
  }
  for (const svg of all('.main-svg', div)) svg.ariaHidden = 'true';  // the label of the plot and its numbers say it in words
  plot.drawn = true;
  plot.stale = false;
  div.removeAttribute('aria-busy');
}

/** What is near the eye at once, the rest in the browser's spare time. */
function redraw() {
  if (!window.Plotly) return;
  for (const plot of plots) { plot.stale = true; plot.div.setAttribute('aria-busy', 'true'); }
  for (const plot of plots) if (plot.near) draw(plot);
  drawNext();
}
function drawNext() {
  const plot = plots.find(plot => plot.stale);
  if (plot) idle(() => { if (plot.stale) draw(plot); drawNext(); });
}

/** Plotly is packed in the page: unpacking it waits until the text can be read. */
async function unpackPlotly() {
  const letters = atob(document.getElementById('plotly').textContent);
  const packed = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) packed[at] = letters.charCodeAt(at);
  const script = document.createElement('script');
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  document.head.append(script);
}

async function start() {
  if (!plots.length) return;
  try {
    await unpackPlotly();
  } catch {
    for (const {div} of plots) { div.textContent = 'Plots need a browser of 2024 or later. The numbers are below.'; div.removeAttribute('aria-busy'); }
    return;
  }
  const seen = new IntersectionObserver(entries => {
    for (const {target, isIntersecting} of entries) {
      const plot = plots.find(plot => plot.div === target);
      plot.near = isIntersecting;
      if (plot.near && plot.stale) draw(plot);
    }
  }, {rootMargin: '400px'});
  for (const plot of plots) seen.observe(plot.div);
  drawNext();
}
requestAnimationFrame(() => setTimeout(start));

for (const box of all('#runs input')) box.addEventListener('change', () => {
  hidden[box.checked ? 'delete' : 'add'](Number(box.value));
  redraw();
});

// On paper every plot is there, in the light theme and not wider than the paper.
let chosen;
addEventListener('beforeprint', () => {
  chosen = root.dataset.theme;
  root.dataset.theme = 'light';
  if (!window.Plotly) return;
  for (const plot of plots) {
    draw(plot);
    plot.div.style.setProperty('--zoom', Math.min(1, 640 / plot.div.clientWidth));
  }
});
addEventListener('afterprint', () => {
  if (chosen) root.dataset.theme = chosen; else delete root.dataset.theme;
  redraw();
});

// --- rollouts -------------------------------------------------------------------------------------------------------
for (const steps of all('.steps')) {
  const choose = steps.querySelector('.choose');
  const radios = all('input', choose);
  const show = () => {
    const value = radios.find(radio => radio.checked)?.value;
    for (const step of all('.step', steps)) step.hidden = step.dataset.step !== value;
  };
  choose.hidden = radios.length < 2;
  choose.addEventListener('change', show);
  show();
}

const probability = text => text === '-' ? 'unknown' : Math.exp(Number(text)).toPrecision(3);
const signed = number => (number > 0 ? '+' : number < 0 ? '−' : '') + Math.abs(number).toPrecision(3);

function tell(token) {
  const rollout = token.closest('.rollout');
  for (const other of all('.rollout .now')) other.classList.remove('now');
  for (const info of all('.info')) if (!rollout.contains(info)) info.replaceChildren();
  token.classList.add('now');
  const [reward, student, teacher] = (token.dataset.v).split(' ');
  const text = document.createElement('b');
  text.textContent = token.textContent.replaceAll('\n', '');
  const parts = [reward === '-' ? 'no reward' : `reward ${signed(Number(reward))}`,
    `student q = ${probability(student)}`, `teacher p = ${probability(teacher)}`];
  if (student !== '-' && teacher !== '-') parts.push(`log p/q = ${signed(teacher - student)}`);
  rollout.querySelector('.info').replaceChildren(text, ` · ${parts.join(' · ')}`);
}

for (const group of all('.tokens')) {
  const tokens = all('span', group);
  let at = 0;
  const stop = index => {  // the one token of the group that Tab reaches
    tokens[at].removeAttribute('tabindex');
    at = Math.max(0, Math.min(tokens.length - 1, index));
    tokens[at].tabIndex = 0;
  };
  if (tokens.length) stop(0);
  group.addEventListener('pointerover', event => { if (event.target.dataset.v) tell(event.target); });
  group.addEventListener('focusin', event => { if (event.target.dataset.v) tell(event.target); });
  group.addEventListener('click', event => {
    if (event.target.dataset.v) { stop(tokens.indexOf(event.target)); tokens[at].focus({preventScroll: true}); }
  });
  group.addEventListener('keydown', event => {
    const to = {ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, Home: 0, End: tokens.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    stop(to);
    tokens[at].focus();
  });
}

// --- contents: where the reader is ----------------------------------------------------------------------------------
const links = new Map(all('nav a').map(link => [link.hash.slice(1), link]));
const headings = all('main h2').filter(heading => links.has(heading.id));
const mark = () => {
  const passed = headings.findLast(heading => heading.getBoundingClientRect().top < innerHeight / 3);
  for (const [id, link] of links) link.toggleAttribute('aria-current', id === passed?.id);
};
addEventListener('scroll', mark, {passive: true});
mark();
themeChanged();
})();

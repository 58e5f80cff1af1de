// What pages of fh_saas need beyond HTML and htmx. Nothing here decides anything: the server does.
(() => {
  'use strict'
  const base = document.currentScript.dataset.jobs, all = (s, el = document) => [...el.querySelectorAll(s)]
  const polls = '[hx-get][hx-trigger*="every"]'

  // Tell those who cannot see it what has become of a job.
  let voice // there before it speaks: a region that comes with its first words is not read out
  const say = text => { voice.textContent = text }
  const states = new Map()
  const heard = first => {
    if (!voice && document.querySelector('[class*=fs-]')) { voice = document.createElement('div'); voice.className = 'fs-hidden'; voice.setAttribute('role', 'status'); document.body.append(voice) }
    const words = [], now = new Map(all('[data-said]').map(el => [el.dataset.job, el]))
    now.forEach((el, job) => {
      const old = states.get(job)
      states.set(job, el.dataset.state)
      if (!first && old !== el.dataset.state && (old !== undefined || 'ended' in el.dataset)) words.push(el.dataset.said)
    })
    const times = words.reduce((n, w) => n.set(w, (n.get(w) ?? 0) + 1), new Map()) // jobs of one title that end together are one sentence
    if (words.length) say([...times].map(([w, n]) => n > 1 ? `${w}, ${n} jobs` : w).join('. '))
  }

  // Parts that are on their way. htmx's own class tells it too soon, or on another element, as the app has set it up.
  const under = new Set()
  document.addEventListener('htmx:beforeSend', e => { if (e.detail.elt.dataset?.live) under.add(e.detail.elt.id) })
  for (const name of ['afterSettle', 'responseError', 'sendError', 'sendAbort', 'timeout']) document.addEventListener(`htmx:${name}`, e => under.delete(e.detail.elt?.id))

  // A page whose htmx did not come asks by itself.
  const again = async el => {
    under.add(el.id)
    const r = await fetch(el.getAttribute('hx-get'), { headers: { 'HX-Request': 'true' } }).catch(() => null)
    const html = r?.ok ? await r.text() : null
    under.delete(el.id)
    if (html !== null) el.outerHTML = html
    changed()
  }
  // News that comes while a part is on its way would be lost with it: it is asked for once more.
  const late = new Set()
  const refresh = el => under.has(el.id) ? late.add(el.id) : window.htmx ? window.htmx.trigger(el, 'jobs-changed') : again(el)
  const catchUp = () => { const ids = [...late]; late.clear(); ids.map(id => document.getElementById(id)).forEach(el => el?.hasAttribute('hx-get') && refresh(el)) }

  // One stream for all live parts of a page.
  let stream, shown = ''
  const after = {}
  const told = id => {
    const parts = () => all('[data-live]').filter(el => el.dataset.live && (!id || el.dataset.live.split(' ').includes(id)))
    parts().forEach(refresh)
    clearTimeout(after[id]) // a part that was just being put in heard nothing
    after[id] = setTimeout(() => { delete after[id]; if (!document.hidden) parts().forEach(refresh) }, 1000)
  }
  // While a job only goes on, its bar and its text are moved where they are.
  const goneOn = j => {
    const of = kind => all(`[data-${kind}]`).filter(el => el.dataset[kind] === j.id)
    for (const el of of('now')) {
      const part = el.closest('[data-live]')
      if (!part) continue
      if (under.has(part.id)) late.add(part.id) // what is on its way is older
      if (j.percent !== null && !of('bar').some(b => part.contains(b))) refresh(part)
      const said = { ...j, percent: j.percent === null ? '' : `${j.percent} %` }
      el.textContent = el.dataset.shows.split(' ').map(k => said[k]).filter(Boolean).join(' · ')
    }
    for (const bar of of('bar')) if (bar.closest('[data-live]')) j.percent === null ? bar.removeAttribute('value') : bar.setAttribute('value', j.percent)
  }
  const lists = () => all('.fs-jobs[data-live], .fs-banner[data-live]')
  const live = () => {
    const parts = all('[data-live]'), ids = [...new Set(parts.flatMap(el => el.dataset.live.split(' ')))].filter(Boolean).sort().slice(-50)
    const tenant = parts.length ? new URL(parts[0].getAttribute('hx-get'), location).searchParams.get('tenant') : null
    const wanted = document.hidden || !ids.length ? '' : `${base}/-/stream?${new URLSearchParams({ jobs: ids.join(','), ...(lists().length && { new: 1 }), ...(tenant && { tenant }) })}`
    if (wanted === shown) return
    stream?.close(); stream = null; shown = wanted
    if (!wanted) return
    stream = new EventSource(wanted)
    stream.addEventListener('job', e => told(e.data))
    stream.addEventListener('new', () => lists().forEach(refresh))
    stream.addEventListener('step', e => goneOn(JSON.parse(e.data)))
    stream.addEventListener('end', () => { stream.close(); told() })
    // one that is refused is given up by the browser; the server may be about to come up
    stream.addEventListener('error', e => { if (e.target.readyState === EventSource.CLOSED && e.target === stream) setTimeout(() => { if (e.target === stream) { shown = ''; live() } }, 3000) })
  }
  const changed = () => { heard(false); live(); catchUp() }
  document.addEventListener('htmx:afterSettle', changed)
  document.addEventListener('visibilitychange', live)

  // The dashboard: its main part comes anew, and keeps what the user has begun.
  const main = document.querySelector('main[data-fresh]')
  const still = main?.dataset.fresh === '0' // a question that waits for its answer
  const busy = () => main.contains(document.activeElement) && /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName) && document.activeElement.type !== 'checkbox'
    || !(getSelection()?.isCollapsed ?? true)
  const renew = async () => {
    const r = await fetch(location.href, { headers: { 'X-Jobs-Refresh': '1' } }).catch(() => null)
    if (!r?.ok || busy()) return
    const fresh = new DOMParser().parseFromString(await r.text(), 'text/html').querySelector('main[data-fresh]')
    if (!fresh || busy()) return
    const keep = new Set(all('input[type=checkbox]:checked', main).map(x => x.name + x.value)), open = new Set(all('details[open]', main).map(d => d.id)), at = document.activeElement?.id, row = all('tr[aria-selected=true]', main)[0]?.id
    const field = x => `${x.form?.action} ${x.name}`, fields = 'textarea, input[type=search], input[type=number], input:not([type])'
    const typed = new Map(all(fields, main).filter(x => x.value !== x.defaultValue).map(x => [field(x), x.value])), rolled = new Map(all('pre[id]', main).map(x => [x.id, x.scrollTop])), [left, top] = [scrollX, scrollY]
    main.replaceChildren(...fresh.childNodes)
    all('input[type=checkbox]', main).forEach(x => { x.checked = keep.has(x.name + x.value) })
    all('details', main).forEach(d => { d.open = d.open || open.has(d.id) })
    all(fields, main).forEach(x => { if (typed.has(field(x))) x.value = typed.get(field(x)) })
    if (at) document.getElementById(at)?.focus({ preventScroll: true })
    if (row) select(document.getElementById(row))
    all('[data-js]', main).forEach(el => { el.hidden = false })
    rolled.forEach((y, id) => { const x = document.getElementById(id); if (x) x.scrollTop = y })
    scrollTo(left, top)
    chosen(); heard(false)
  }
  const select = tr => { all('tr[aria-selected=true]', main).forEach(x => x.removeAttribute('aria-selected')); tr?.setAttribute('aria-selected', 'true') }
  const choose = tr => { select(tr); tr?.scrollIntoView({ block: 'nearest' }) }
  const chosen = () => { const n = all('input[name=job]:checked', main).length; all('[data-chosen]', main).forEach(x => { x.textContent = n ? `${n} chosen` : 'None chosen' }); all('button[data-needs]', main).forEach(b => { b.disabled = !n }) }
  const step = by => {
    const rows = all('tbody tr[id]', main), now = rows.findIndex(r => r.getAttribute('aria-selected'))
    if (rows.length) choose(rows[Math.max(0, Math.min(rows.length - 1, now < 0 ? 0 : now + by))])
  }
  const keys = {
    '/': () => document.querySelector('input[type=search]')?.focus(), '?': () => document.getElementById('fs-keys')?.showModal(), r: () => still || renew(), j: () => step(1), k: () => step(-1),
    x: () => { const box = document.querySelector('tr[aria-selected=true] input[type=checkbox]'); if (box) { box.checked = !box.checked; chosen() } },
    Enter: () => document.querySelector('tr[aria-selected=true] a')?.click()
  }
  const dashboard = () => {
    const every = document.getElementById('fs-every'), look = document.getElementById('fs-look'), kept = k => { try { return localStorage.getItem(k) } catch { return null } }, keep = (k, v) => { try { localStorage.setItem(k, v) } catch { /* a browser that keeps nothing */ } }
    let timer
    const pace = () => { clearInterval(timer); if (+every.value && !still) timer = setInterval(() => document.hidden || renew(), every.value * 1000) }
    every.value = kept('fs-every') ?? every.value; every.onchange = () => { keep('fs-every', every.value); pace() }; pace()
    const paint = () => { document.body.dataset.look = look.value }
    look.value = kept('fs-look') ?? 'auto'; look.onchange = () => { keep('fs-look', look.value); paint() }; paint()
    all('[data-js]').forEach(el => { el.hidden = false })
    document.getElementById('fs-tenant')?.addEventListener('change', e => e.target.form.submit())
    document.addEventListener('keydown', e => {
      if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT|BUTTON|A|SUMMARY)$/.test(e.target.tagName) && (e.key === 'Enter' || e.target.type !== 'checkbox' && /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName))) return
      if (document.querySelector('dialog[open]') || !keys[e.key]) return
      e.preventDefault(); keys[e.key]()
    })
    main.addEventListener('change', e => { if (e.target.id === 'fs-all') all('input[name=job]', main).forEach(x => { x.checked = e.target.checked }); chosen() })
    main.addEventListener('click', e => {
      const from = e.target.closest('[data-copy]')
      if (from) navigator.clipboard?.writeText(document.getElementById(from.dataset.copy).textContent).then(() => say('Copied'))
    })
    setInterval(() => all('time[data-until]', main).forEach(t => { const s = Math.round((new Date(t.dateTime) - Date.now()) / 1000); t.textContent = s > 0 ? `in ${s} s` : 'now' }), 1000)
    chosen()
  }

  const begin = () => {
    heard(true); live()
    setInterval(() => window.htmx || document.hidden || all(polls).forEach(again), 3000)
    if (main) dashboard()
  }
  document.readyState === 'loading' ? document.addEventListener('DOMContentLoaded', begin) : begin()
})()

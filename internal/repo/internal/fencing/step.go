package fencing

import "math/bits"

// next calls yield with every state that one step of anybody leads to.
func (p Plan) next(s state, yield func(who string, t state)) {
	for i := range p.Writers {
		p.writer(s, i, yield)
	}
	for i := range p.Vacuums {
		p.vacuum(s, i, yield)
	}
	if s.deletes > 0 {
		for m := s.points; m != 0; m &= m - 1 {
			t := s
			t.points &^= m & -m
			t.deletes--
			yield("somebody deletes a point", t)
		}
	}
}

// take adopts the newest epoch, in the writer's memory.
func (p Plan) take(s *state, w *writer) {
	w.condemned |= p.binding(s, w.epoch)
	w.epoch, w.pending = s.epochs, true
}

// write creates a session object; all of them count together.
func (p Plan) write(w *writer) {
	w.shown, w.pending = true, false
	w.sEpoch = max(w.sEpoch, w.epoch)
	if p.Fault != NoPacksInAdoption {
		w.sPacks |= w.used & w.condemned
	}
}

func (p Plan) writer(s state, i int, yield func(string, state)) {
	who := [...]string{"writer 0", "writer 1"}[i]
	step := func(change func(t *state, w *writer)) {
		t := s
		change(&t, &t.w[i])
		if w := &t.w[i]; w.pc == wDone {
			// What nobody asks for any more must not make states different.
			*w = writer{pc: wDone, outcome: w.outcome, shown: w.shown, sEpoch: w.sEpoch, sManifests: w.sManifests, sPacks: w.sPacks}
		}
		yield(who, t)
	}
	w := s.w[i]
	own := uint8(1) << (packC0 + i)
	manifest := uint8(1) << (1 + i)
	// Between its calls it looks for newer epochs.
	if w.pc > wLoad && w.pc < wDone {
		if w.pending {
			step(func(t *state, w *writer) { p.write(w) })
		} else if s.epochs > w.epoch {
			step(func(t *state, w *writer) { p.take(t, w) })
		}
	}
	switch w.pc {
	case wIdle:
		step(func(t *state, w *writer) { p.take(t, w); w.pc++ })
	case wAnnounce:
		step(func(t *state, w *writer) {
			p.write(w)
			w.pc++
			if p.Fault == NoSecondLook {
				w.pc = wLoad
			}
		})
	case wLook:
		step(func(t *state, w *writer) {
			w.pc = wLoad
			if t.epochs > w.epoch {
				p.take(t, w)
				w.pc = wAdopt
			}
		})
	case wAdopt:
		step(func(t *state, w *writer) { p.write(w); w.pc++ })
	case wLoad:
		step(func(t *state, w *writer) {
			w.view = t.packs
			w.pc = wLookup
			if p.Base[i] >= 0 {
				w.pc = wHold
				if p.Fault == CheckBeforeHold || p.Fault == NoHold {
					w.pc = wCheck
				}
			}
		})
	case wHold:
		step(func(t *state, w *writer) {
			w.sManifests |= 1 << p.Base[i]
			w.pc = wCheck
			if p.Fault == CheckBeforeHold {
				w.pc = wLookup
			}
		})
	case wCheck:
		step(func(t *state, w *writer) {
			w.pc = wLookup
			if t.points&(1<<p.Base[i]) != 0 {
				w.based = true
				w.needs |= t.mNeeds[p.Base[i]]
				if p.Fault == CheckBeforeHold {
					w.pc = wHold
				}
			}
		})
	case wLookup:
		left := p.Lookup[i] &^ w.looked
		if left == 0 {
			step(func(t *state, w *writer) { w.pc++ })
			break
		}
		chunk := left & -left
		found := false
		for m := w.view&^w.condemned | w.view&w.used; m != 0; m &= m - 1 {
			pack := bits.TrailingZeros8(m)
			if s.content(pack)&chunk == 0 {
				continue
			}
			found = true
			step(func(t *state, w *writer) {
				w.looked |= chunk
				w.needs |= chunk
				w.used |= 1 << pack
			})
		}
		if !found {
			step(func(t *state, w *writer) { w.looked |= chunk })
		}
	case wStore:
		step(func(t *state, w *writer) {
			w.used |= own
			w.needs |= chunkC0 << i
			t.packs |= own
			w.pc++
		})
	case wName:
		step(func(t *state, w *writer) {
			if p.Fault != NoOwnManifest {
				w.sManifests |= manifest
			}
			w.pc++
		})
	case wManifest:
		step(func(t *state, w *writer) {
			t.manifests |= manifest
			t.mNeeds[1+i] = w.needs
			w.pc++
		})
	case wCommit:
		step(func(t *state, w *writer) {
			w.pc = wDone
			if w.outcome == open || p.Fault == NoOutcome {
				w.outcome = committed
				t.points |= manifest
				if p.Fault == SessionsGoAtOnce {
					w.shown, w.sEpoch, w.sManifests, w.sPacks = false, 0, 0, 0
				}
			}
		})
	}
}

// need is what a manifest needs to be read, as far as it is there.
func (s *state) need(manifests uint8) (chunks, there uint8) {
	there = manifests & s.manifests
	for m := there; m != 0; m &= m - 1 {
		chunks |= s.mNeeds[bits.TrailingZeros8(m)]
	}
	return chunks, there
}

// said are the manifests that sessions name, but for those that are over.
func (s *state) said(over uint8) (manifests, packs uint8) {
	for i := range s.w {
		if w := &s.w[i]; w.shown && over&(1<<i) == 0 {
			manifests |= w.sManifests
			packs |= w.sPacks
		}
	}
	return manifests, packs
}

// place is the pack that a vacuum knows a chunk to be in: the newest.
func (s *state) place(view, chunk uint8) int {
	for pack := packs - 1; pack >= 0; pack-- {
		if view&(1<<pack) != 0 && s.content(pack)&chunk != 0 {
			return pack
		}
	}
	return -1
}

// choose says which packs a vacuum condemns, and which chunks it copies first.
func (s *state) choose(view, alive uint8) (goes, copies uint8) {
	for pack := range packs {
		if view&(1<<pack) == 0 {
			continue
		}
		var live uint8
		for c := s.content(pack); c != 0; c &= c - 1 {
			if chunk := c & -c; alive&chunk != 0 && s.place(view, chunk) == pack {
				live |= chunk
			}
		}
		if live != s.content(pack) {
			goes |= 1 << pack
			copies |= live
		}
	}
	return goes, copies
}

func (p Plan) vacuum(s state, i int, yield func(string, state)) {
	who := [...]string{"vacuum 0", "vacuum 1"}[i]
	step := func(change func(t *state, v *vacuum)) {
		t := s
		change(&t, &t.v[i])
		if v := &t.v[i]; v.pc > vDecide {
			*v = vacuum{pc: v.pc, outcome: v.outcome, epoch: v.epoch, goes: v.goes, dies: v.dies}
		}
		yield(who, t)
	}
	v := s.v[i]
	other := &s.v[1-i]
	revoke := func(j int) {
		step(func(t *state, v *vacuum) {
			if t.w[j].outcome == open {
				t.w[j].outcome = revoked
			}
			v.over |= 1 << j
		})
	}
	switch v.pc {
	case vIdle:
		// The other one is taken for dead, or has decided: then this one deletes
		// what it was going to.
		step(func(t *state, v *vacuum) {
			o := &t.v[1-i]
			if other.pc != vIdle && o.outcome == open {
				o.outcome = revoked
			}
			if o.outcome == committed {
				t.packs &^= o.goes
				t.manifests &^= o.dies
			}
			v.pc++
		})
	case vOver:
		for j := range s.w {
			if s.w[j].shown && s.w[j].outcome == open && v.over&(1<<j) == 0 {
				revoke(j)
			}
		}
		step(func(t *state, v *vacuum) {
			for j := range t.w {
				if t.w[j].shown && t.w[j].outcome != open {
					v.over |= 1 << j
				}
			}
			v.pc++
		})
	case vLoad:
		step(func(t *state, v *vacuum) {
			v.view, v.mans = t.packs, t.manifests
			v.pc++
			if p.Fault == SessionsFirst {
				v.held, _ = t.said(v.over)
			}
		})
	case vPoints:
		step(func(t *state, v *vacuum) {
			v.alive, v.named = t.need(t.points)
			v.pc++
		})
	case vSessions:
		step(func(t *state, v *vacuum) {
			said, _ := t.said(v.over)
			chunks, _ := t.need(said)
			v.alive |= chunks
			v.named |= said
			v.pc++
		})
	case vCopy:
		step(func(t *state, v *vacuum) {
			goes, copies := t.choose(v.view, v.alive)
			v.goes = goes
			if copies != 0 {
				t.fresh[i] = copies
				t.packs |= 1 << (packF0 + i)
			}
			v.pc++
		})
	case vCondemn:
		step(func(t *state, v *vacuum) {
			t.epochs++
			t.condemned[t.epochs], t.by[t.epochs] = v.goes, uint8(i)
			v.epoch = t.epochs
			v.pc++
		})
	case vList:
		step(func(t *state, v *vacuum) {
			for j := range t.w {
				if t.w[j].shown && v.over&(1<<j) == 0 {
					v.waits |= 1 << j
				}
			}
			v.pc++
			if p.Fault == NoWait {
				v.waits = 0
			}
			if p.Fault == SessionsFirst {
				v.held, _ = t.said(v.over)
			}
		})
	case vWait:
		if v.waits == 0 {
			step(func(t *state, v *vacuum) {
				v.pc++
				if p.Fault == NoRescue {
					v.pc = vDecide
					v.dies = v.mans &^ v.named
				}
			})
			break
		}
		for j := range s.w {
			if v.waits&(1<<j) == 0 {
				continue
			}
			if w := &s.w[j]; w.outcome != open || w.sEpoch >= v.epoch {
				step(func(t *state, v *vacuum) { v.waits &^= 1 << j })
			} else {
				step(func(t *state, v *vacuum) {
					t.w[j].outcome = revoked
					v.waits &^= 1 << j
				})
			}
		}
	case vPoints2:
		step(func(t *state, v *vacuum) {
			needs, named := t.need(t.points)
			v.rescue(t, needs)
			v.named |= named
			v.pc++
		})
	case vSessions2:
		step(func(t *state, v *vacuum) {
			said, packs := t.said(v.over)
			if p.Fault == SessionsFirst {
				said = v.held
			}
			chunks, _ := t.need(said)
			v.rescue(t, chunks)
			v.goes &^= packs
			v.named |= said
			v.dies = v.mans &^ v.named
			v.pc++
		})
	case vDecide:
		step(func(t *state, v *vacuum) {
			switch {
			case v.outcome == open:
				v.outcome = committed
				v.pc++
			case p.Fault == NoFence:
				v.pc++
			default:
				v.pc = vDone
			}
		})
	case vDelete:
		if v.goes|v.dies == 0 {
			step(func(t *state, v *vacuum) {
				t.gone |= 1<<v.epoch - 1
				v.pc++
			})
			break
		}
		// One object at a time, so that it may sleep in between. What it deleted
		// it forgets: the list in its outcome is only of use to the other one,
		// who may delete again what is gone.
		step(func(t *state, v *vacuum) {
			if v.dies != 0 {
				t.manifests &^= v.dies & -v.dies
				v.dies &= v.dies - 1
			} else {
				t.packs &^= v.goes & -v.goes
				v.goes &= v.goes - 1
			}
		})
	}
}

// rescue takes packs out of those that go in which a chunk lies that is needed
// after all.
func (v *vacuum) rescue(s *state, needs uint8) {
	for c := needs &^ v.alive; c != 0; c &= c - 1 {
		if pack := s.place(v.view, c&-c); pack >= 0 {
			v.goes &^= 1 << pack
		}
	}
}

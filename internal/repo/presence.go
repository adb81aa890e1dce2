package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

const (
	sessionPrefix = "session/"
	beatPrefix    = "beat/"
)

// beatEvery is how often a session shows that it lives and looks for a newer
// epoch. A vacuum beside it waits about that long.
var beatEvery = 5 * time.Second

// sessionObject is one of session/<ulid>-….
type sessionObject struct {
	Format    int      `json:"format"`
	Session   string   `json:"session"`
	Process   *process `json:"process,omitempty"`
	Epoch     int64    `json:"epoch,omitempty"`
	Manifests []string `json:"manifests,omitempty"`
	Packs     []string `json:"packs,omitempty"`
}

type beatObject struct {
	Format int   `json:"format"`
	Beat   int64 `json:"beat"`
}

func sessionName(id string, n int) string { return fmt.Sprintf("%s%s-%06d", sessionPrefix, id, n) }

// parseSessionName gives the session that owns a name under session/.
func parseSessionName(name string) (id string, ok bool) {
	rest := strings.TrimPrefix(name, sessionPrefix)
	if !parsePointName(rest) {
		return "", false
	}
	id, _, _ = strings.Cut(rest, "-")
	return id, true
}

// A presence is what a session shows to vacuums: which epoch it is in, and what
// it needs. See docs/format/repository.md, "Vacuum and writers".
type presence struct {
	r    *Repository
	id   string
	stop func() // ends the beat and waits for it; nil before

	// writing has one place, for who makes a session object: a later one says at
	// least what an earlier one did.
	writing chan struct{}

	mu        sync.Mutex
	objects   int               // made so far
	epoch     int64             // adopted, perhaps not yet written
	condemned []*epoch          // all that were adopted
	used      map[[32]byte]bool // packs that this session relies on or stored
	last      [32]byte          // of used
	needs     []string          // manifests
	unwritten bool
}

func newPresence(r *Repository, id string) *presence {
	return &presence{r: r, id: id, used: map[[32]byte]bool{}, writing: make(chan struct{}, 1)}
}

// announce creates the first session object and is in the newest epoch when it
// returns.
func (p *presence) announce(ctx context.Context) error {
	if err := p.take(ctx); err != nil {
		return err
	}
	liveHere(p.id, true)
	if err := p.write(ctx); err != nil {
		return err
	}
	return p.follow(ctx)
}

// follow adopts the newest epoch if the session is not in it yet.
func (p *presence) follow(ctx context.Context) error {
	if err := p.take(ctx); err != nil {
		return err
	}
	p.mu.Lock()
	unwritten := p.unwritten
	p.mu.Unlock()
	if !unwritten {
		return nil
	}
	return p.write(ctx)
}

// take treats what newer epochs condemn as absent from now on.
func (p *presence) take(ctx context.Context) error {
	p.mu.Lock()
	after := p.epoch
	p.mu.Unlock()
	es, err := p.r.epochsAfter(ctx, after)
	if err != nil {
		return fmt.Errorf("what a vacuum deletes is not known: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range es {
		if e.n > p.epoch {
			p.condemned = append(p.condemned, e)
			p.epoch = e.n
			p.unwritten = true
		}
	}
	return nil
}

// write makes what p needs durable.
func (p *presence) write(ctx context.Context) error {
	select {
	case p.writing <- struct{}{}:
		defer func() { <-p.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.mu.Lock()
	o := sessionObject{Format: formatVersion, Session: p.id, Process: thisProcess(p.r.id), Epoch: p.epoch, Manifests: slices.Clone(p.needs)}
	for _, e := range p.condemned {
		for id := range e.packs {
			if p.used[id] {
				o.Packs = append(o.Packs, hex.EncodeToString(id[:]))
			}
		}
	}
	name := sessionName(p.id, p.objects)
	p.objects++
	p.unwritten = false
	p.mu.Unlock()
	slices.Sort(o.Packs)
	o.Packs = slices.Compact(o.Packs)
	b, err := object.Encode(o)
	if err == nil {
		// Nobody else makes this name: one that exists is this one, stored by a
		// call whose reply was lost.
		if err = create(ctx, p.r.st, name, b); errors.Is(err, fault.ErrExists) {
			err = nil
		}
	}
	if err != nil {
		p.mu.Lock()
		p.unwritten = true
		p.mu.Unlock()
	}
	return err
}

// need keeps the manifests from vacuums from when it returns.
func (p *presence) need(ctx context.Context, ids ...point.ManifestID) error {
	p.mu.Lock()
	for _, id := range ids {
		if !slices.Contains(p.needs, string(id)) {
			p.needs = append(p.needs, string(id))
			p.unwritten = true
		}
	}
	unwritten := p.unwritten
	p.mu.Unlock()
	if !unwritten {
		return nil
	}
	if err := p.write(ctx); err != nil {
		return fmt.Errorf("store session: %w", err)
	}
	return nil
}

// rely says whether the session may rely on what lies in pack; if so, it does.
func (p *presence) rely(pack [32]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == pack || p.used[pack] {
		p.last = pack
		return true
	}
	for _, e := range p.condemned {
		if e.condemns(pack) {
			return false
		}
	}
	p.used[pack], p.last = true, pack
	return true
}

// own notes a pack that the session is about to store.
func (p *presence) own(pack [32]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used[pack] = true
}

// keep beats and follows epochs until stop is called; fenced is called once
// the outcome says that somebody revoked the session.
func (p *presence) keep(fenced func()) {
	p.stop = eachBeat(func(ctx context.Context, n int64) (more bool) {
		// A store that does not answer now may do so next time.
		_ = p.r.beat(ctx, p.id, n)
		_ = p.follow(ctx)
		if out, err := p.r.outcomeOf(ctx, p.id); err == nil && out.State == revoked {
			fenced()
			return false
		}
		return true
	})
}

// eachBeat calls do with 1, 2 and so on until it gives false or stop is called,
// which waits for the last one.
func eachBeat(do func(ctx context.Context, n int64) (more bool)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(beatEvery)
		defer t.Stop()
		for n := int64(1); ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			if !do(ctx, n) {
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		cancel()
		<-done
	})
}

func (r *Repository) beat(ctx context.Context, id string, n int64) error {
	b, err := object.Encode(beatObject{Format: formatVersion, Beat: n})
	if err != nil {
		return err
	}
	return put(ctx, r.st, beatPrefix+id, b)
}

// end stops beating. What the session said of itself stays.
func (p *presence) end(ctx context.Context) {
	if p.stop != nil {
		p.stop()
	}
	liveHere(p.id, false)
	ctx, cancel := tidying(ctx)
	defer cancel()
	_ = p.r.st.Delete(ctx, beatPrefix+p.id)
}

// withdraw takes the session objects away. The session must never commit.
func (p *presence) withdraw(ctx context.Context) error {
	ctx, cancel := tidying(ctx)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	// The first one last: whoever sees any of them sees the session.
	for n := range p.objects {
		if err := p.r.st.Delete(ctx, sessionName(p.id, p.objects-1-n)); err != nil {
			return err
		}
	}
	return nil
}

// tidying is the context of what a vacuum would do as well: it happens also
// after ^C, but a store that does not answer is not waited for.
func tidying(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
}

// Hold keeps what a restore point that exists needs from vacuums, also if the
// point is deleted, until release is called. It gives fault.ErrNotFound if the
// point is gone. A store that takes no writes can't hold anything: then the
// error is the store's, and reading goes on at the owner's risk.
func (r *Repository) Hold(ctx context.Context, p *point.RestorePoint) (release func(), err error) {
	id, _, err := newID()
	if err != nil {
		return nil, err
	}
	pr := newPresence(r, id)
	for _, d := range p.Disks {
		if !slices.Contains(pr.needs, string(d.Manifest)) {
			pr.needs = append(pr.needs, string(d.Manifest))
		}
	}
	if err := pr.announce(ctx); err != nil {
		return nil, err
	}
	pr.keep(func() {})
	release = sync.OnceFunc(func() {
		pr.end(ctx)
		_ = pr.withdraw(ctx)
	})
	if err := r.holdFiles(ctx, pr, p); err != nil {
		release()
		return nil, err
	}
	for _, m := range pr.needs {
		if err := r.mustBeNamed(ctx, point.ManifestID(m)); err != nil {
			release()
			return nil, err
		}
	}
	return release, nil
}

// holdFiles makes pr rely on the packs of the point's small files, which no
// manifest names. What cannot be found, reading them will say.
func (r *Repository) holdFiles(ctx context.Context, pr *presence, p *point.RestorePoint) error {
	if len(p.Config) == 0 {
		return nil
	}
	if err := r.settle(ctx, pr); err != nil {
		return err
	}
	h, err := r.held(ctx)
	if err != nil {
		return err
	}
	for _, b := range p.Config {
		for _, id := range b.Chunks {
			in, ok, err := r.stores(ctx, h, id)
			if err != nil {
				return err
			}
			if ok {
				pr.rely(in)
			}
		}
	}
	return nil
}

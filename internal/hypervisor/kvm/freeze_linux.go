package kvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

const (
	defaultFreezeLimit = 2 * time.Second
	// A Windows agent answers when all VSS writers have frozen. They stand
	// still only at the end of that, and by themselves give up after 10 s.
	windowsPrepare = 60 * time.Second
	// watchdogGrace is how much later than we the watchdog thaws.
	watchdogGrace = time.Second
	// thawPatience is how long we ourselves go on trying to thaw, before it is
	// left to the watchdog.
	thawPatience = 15 * time.Second
)

// errNotFrozen says that the guest could not be frozen, that it is thawed, and
// that no snapshot was taken.
var errNotFrozen = errors.New("the guest could not be frozen")

// A freezer holds one guest still for one snapshot.
type freezer struct {
	dom     *domain // on a connection of its own: thawing waits for nobody
	limit   time.Duration
	windows bool
	run     *journal.Run
	dog     *watchdog
}

// freezer prepares everything that a freeze needs, so that nothing has to be
// set up while the guest stands still.
func (b *beginning) freezer(ctx context.Context) (*freezer, error) {
	f := &freezer{limit: b.o.FreezeLimit, windows: b.ready.windows, run: b.run}
	if f.limit <= 0 {
		f.limit = defaultFreezeLimit
	}
	f.dom = &domain{newConn(b.dom.uri), b.dom.name, b.dom.id}
	_, err := f.dom.active(ctx) // connects
	if err == nil {
		f.dog, err = startWatchdog(ctx, b.d.exe, order{URI: b.dom.uri.String(), UUID: b.dom.id, Name: b.dom.name,
			After: f.request() + f.limit + watchdogGrace})
	}
	if err != nil {
		f.dom.close()
		return nil, fmt.Errorf("%w: thaw watchdog: %w", errNotFrozen, err)
	}
	return f, nil
}

// request is how long the agent may take to freeze.
func (f *freezer) request() time.Duration {
	if f.windows {
		return windowsPrepare
	}
	return f.limit
}

// hold freezes the guest, calls snap, and thaws. held is how long the guest
// may have stood still; lost says why it can't be said to have stood still
// when snap was done, although snap returned nil.
func (f *freezer) hold(ctx context.Context, snap func() error) (held time.Duration, lost string, err error) {
	if err := f.run.Note(freezeEntry(f.dom, time.Now().Add(f.request()+f.limit+watchdogGrace+watchdogPatience))); err != nil {
		return 0, "", err
	}
	if err := f.dog.arm(); err != nil {
		return 0, "", fmt.Errorf("%w: thaw watchdog: %w", errNotFrozen, err)
	}
	start := time.Now()
	var count int
	err = f.dom.agent(ctx, f.request(), "guest-fsfreeze-freeze", nil, &count)
	if f.windows && err == nil {
		start = time.Now()
	}
	if took := time.Since(start); err == nil && took >= f.limit {
		err = fmt.Errorf("it took %v, and the limit is %v", took.Round(time.Millisecond), f.limit)
	}
	if err == nil && count == 0 {
		err = errors.New("the agent found no file system to freeze")
	}
	if err != nil {
		// Whatever the agent did by now or will still do is undone.
		if _, e := f.thaw(ctx); e != nil {
			return time.Since(start), "", errors.Join(err, e)
		}
		return time.Since(start), "", fmt.Errorf("%w: %w", errNotFrozen, err)
	}
	type thawed struct {
		count int
		err   error
	}
	early := make(chan thawed, 1)
	timer := time.AfterFunc(f.limit-time.Since(start), func() {
		n, err := f.thaw(ctx)
		early <- thawed{n, err}
	})
	err = snap()
	var t thawed
	if timer.Stop() {
		t.count, t.err = f.thaw(ctx)
	} else {
		t = <-early
		lost = fmt.Sprintf("the snapshot took longer than the freeze limit of %v, and the guest was thawed before it", f.limit)
	}
	held = time.Since(start)
	if t.err != nil {
		return held, lost, errors.Join(err, t.err)
	}
	if t.count == 0 && lost == "" {
		lost = "the guest was thawed by somebody else before the snapshot was complete"
	}
	return held, lost, err
}

// thaw ends our freeze and stands the watchdog down. It outlasts ctx: a guest
// stays frozen for nobody's ^C.
func (f *freezer) thaw(ctx context.Context) (count int, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawPatience)
	defer cancel()
	count, err = f.dom.thaw(ctx)
	if err != nil {
		return count, fmt.Errorf("thaw the guest, which the watchdog goes on trying: %w", err)
	}
	f.dog.standDown()
	return count, f.run.Done(kindFreeze, f.dom.uuid())
}

// close leaves the guest to the watchdog if it was not thawed.
func (f *freezer) close() {
	f.dog.close()
	f.dom.close()
}

// thaw asks the agent until it answers, the VM is gone, or ctx is over. It
// gives the number of file systems that were frozen until now.
func (d *domain) thaw(ctx context.Context) (count int, err error) {
	for {
		err = d.agent(ctx, agentTimeout, "guest-fsfreeze-thaw", nil, &count)
		switch {
		case err == nil:
			return count, nil
		case errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning), code(err) == libvirt.ErrOperationInvalid:
			return 0, nil // a VM that is off is not frozen
		}
		select {
		case <-ctx.Done():
			return 0, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

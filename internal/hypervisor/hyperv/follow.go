package hyperv

import (
	"context"
	"errors"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/wsman"
)

// seekTime bounds the search for a VM from one node, which may ask some that do
// not answer.
const seekTime = 30 * time.Second

// follow looks whether another node of the cluster has the VM by now, which may
// be why something failed on from. If so, the session speaks to that from then
// on. If from does not answer, it waits for the cluster to start the VM anew, or
// until ctx ends.
func (b *beginning) follow(ctx context.Context, from *Driver, why error) bool {
	select {
	case b.moving <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-b.moving }()
	if b.at() != from {
		return true // somebody followed meanwhile
	}
	if from.cluster.isAlone() {
		return false
	}
	for began := time.Now(); ; {
		here := why
		cut := (*wsman.ConnectionError)(nil)
		if !errors.As(here, &cut) { // else it has not answered just now
			if here = b.target().onHost(ctx); here == nil {
				return false
			}
		}
		silent := errors.As(here, &cut)
		now, err := from.seek(ctx, b.sys.guid, silent)
		most := from.busyTime
		if silent {
			most = from.failTime
		}
		switch {
		case err == nil && now.d == from:
			return false
		case err == nil:
			b.where.Lock()
			b.d = now.d
			b.where.Unlock()
			if b.entry.Data != nil { // the reference point will say so, even if the VM goes back
				b.entry.Data[dataMoved] = from.called()
			}
			from.log.Info("the VM moved to another node", "vm", b.sys.name, "node", now.host)
			return true
		case !errors.Is(err, fault.ErrNotFound) || !silent && !errors.Is(here, errElsewhere) || time.Since(began) > most:
			return false
		}
		// It may be between two nodes.
		if sleep(ctx, from.poll) != nil {
			return false
		}
	}
}

// seek finds a VM. If the host was silent just now, the first other node that
// answers does it: it knows which nodes are down.
func (d *Driver) seek(ctx context.Context, guid string, silent bool) (sighting, error) {
	if !silent {
		return d.find(ctx, guid)
	}
	err := errSilent
	for _, name := range d.cluster.known() {
		n, e := d.at(name)
		if e != nil || n == d {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, seekTime)
		at, e := n.find(limited, guid)
		cancel()
		if e == nil || errors.Is(e, fault.ErrNotFound) {
			return at, e
		}
		err = e
	}
	return sighting{}, err
}

package host

import (
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// applySnapshot is VSSS.ApplySnapshot: the disks are again what they were. Only
// the newest checkpoint can be applied, since the others would make a tree of
// the chain.
func (h *Host) applySnapshot(args results) (results, uint32) {
	v, s := h.snapshotOf(args["Snapshot"])
	switch {
	case s == nil || v.planned:
		return nil, codeParameter
	case s.kind != userMade || v.snapshots[len(v.snapshots)-1] != s:
		return nil, codeUnsupported
	case v.state != stateOff && v.state != stateSaved:
		return nil, codeState
	}
	return h.start(v, "ApplySnapshot", func() ([]affected, error) {
		at := v.moments["Microsoft:"+s.config.id]
		var list []*disk
		for _, d := range v.list {
			l := s.frozen[d.id]
			if l == nil {
				_ = h.detach(d) // it is younger than the checkpoint, and goes
				continue
			}
			list = append(list, d)
			if err := h.goBack(d, l, at[d.id]); err != nil {
				return nil, err
			}
		}
		v.list = list
		name, root := v.config.vssd.Get("ElementName"), v.config.vssd
		c := s.config.copy(v.config.id)
		for _, kept := range []string{"VirtualSystemType", "ConfigurationID", "ConfigurationFile", "GuestStateFile", "CreationTime"} {
			c.vssd.Put(kept, root.Get(kept))
		}
		c.vssd.Put("ElementName", name).Put("Parent", cim.Text(s.config.vssd.Ref().Path()))
		v.config, v.applied, v.state, v.changed = c, s.config.id, stateOff, h.stamp()
		v.placeAll()
		return []affected{{v.ref(), effectUnknown}}, h.writeAll(v)
	})
}

// goBack gives up what was written since l, where the log had n entries. The
// tracks stay: they know of guests' writes alone.
func (h *Host) goBack(d *disk, l *layer, n int) error {
	at := slices.Index(d.layers, l)
	for _, gone := range d.layers[at+1:] {
		if err := errors.Join(gone.file.close(), os.Remove(h.local(gone.path))); err != nil {
			return err
		}
	}
	d.layers = d.layers[:at+1]
	d.log = append(d.log, write{back: n + 1})
	return h.freeze(d)
}

// history are the writes that the first n entries of the log amount to.
func (d *disk) history(n int) []write {
	var out []write
	for _, w := range d.log[:n] {
		if w.back > 0 {
			out = d.history(w.back - 1)
			continue
		}
		out = append(out, w)
	}
	return out
}

// destroyTree is VSSS.DestroySnapshotTree.
func (h *Host) destroyTree(args results) (results, uint32) {
	v, s := h.snapshotOf(args["SnapshotSettingData"])
	if s == nil {
		return nil, codeParameter
	}
	return h.start(v, "DestroySnapshotTree", func() ([]affected, error) {
		gone := []*snapshot{s}
		for i := 0; i < len(gone); i++ {
			for _, t := range v.snapshots {
				if ref, err := cim.ParsePath(t.config.vssd.Get("Parent").String(), cim.Virtualization); err == nil && ref.Equal(gone[i].config.vssd.Ref()) && !slices.Contains(gone, t) {
					gone = append(gone, t)
				}
			}
		}
		for _, t := range slices.Backward(gone) {
			if v.planned {
				v.forget(t)
			} else if err := h.drop(v, t); err != nil {
				return nil, err
			}
		}
		return []affected{{v.ref(), effectUnknown}}, nil
	})
}

// clearState is VSSS.ClearSnapshotState: the checkpoint's memory goes.
func (h *Host) clearState(args results) (results, uint32) {
	v, s := h.snapshotOf(args["SnapshotSettingData"])
	if s == nil || v.planned {
		return nil, codeParameter
	}
	return h.start(v, "ClearSnapshotState", func() ([]affected, error) {
		s.config.vssd.Put("IsSaved", cim.Bool(false))
		if err := os.Remove(h.local(strings.TrimSuffix(s.config.definition(), extDefinition)) + extRuntime); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		return nil, h.writeFiles(s.config)
	})
}

package kvm

import (
	"encoding/json"
	"fmt"
)

// A node is one of QEMU's block nodes, as query-named-block-nodes shows it.
type node struct {
	Name    string   `json:"node-name"`
	File    string   `json:"file"`
	RO      bool     `json:"ro"`
	Bitmaps []bitmap `json:"dirty-bitmaps"`
	Image   struct {
		VirtualSize int64 `json:"virtual-size"`
		Specific    struct {
			Data struct {
				Compat string `json:"compat"`
			} `json:"data"`
		} `json:"format-specific"`
	} `json:"image"`
}

type bitmap struct {
	Name         string `json:"name"`
	Recording    bool   `json:"recording"`
	Persistent   bool   `json:"persistent"`
	Busy         bool   `json:"busy"`
	Inconsistent bool   `json:"inconsistent"`
	Granularity  int64  `json:"granularity"`
}

func (n *node) bitmap(name string) (bitmap, bool) {
	for _, b := range n.Bitmaps {
		if b.Name == name {
			return b, true
		}
	}
	return bitmap{}, false
}

// parseQMP takes a reply of QEMU's monitor apart; into may be nil.
func parseQMP(reply string, into any) error {
	var r struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(reply), &r); err != nil {
		return fmt.Errorf("reply of QEMU: %w", err)
	}
	if r.Error != nil {
		return fmt.Errorf("QEMU: %s", r.Error.Desc)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, into); err != nil {
		return fmt.Errorf("reply of QEMU: %w", err)
	}
	return nil
}

// bitmapState looks for the bitmap of a checkpoint in the layers of a disk,
// top first. Lower layers are below an external snapshot: theirs no longer
// record, and need only be sound.
func bitmapState(nodes map[string]node, layers []string, name string) tracking {
	for i, layer := range layers {
		n, ok := nodes[layer]
		if !ok {
			break
		}
		b, ok := n.bitmap(name)
		switch {
		case !ok && i == 0:
			return bitmapMissing
		case !ok:
			return bitmapHealthy // a layer from before the checkpoint
		case b.Inconsistent:
			return bitmapInconsistent
		case i == 0 && (!b.Recording || !b.Persistent):
			return bitmapDisabled
		}
		if i == len(layers)-1 {
			return bitmapHealthy
		}
	}
	return bitmapMissing
}

package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
)

// magicTracking begins a change tracking file ("-ctk.vmdk"), in which ESXi
// notes the blocks that were written since a change ID. A descriptor names it
// in changeTrackPath; we show the name and never open it.
const magicTracking = "\xa2\x72\x19\xf6"

// trackingMap says why a change tracking file is no disk and no source of
// changed extents either: VMware published no description of it, and what
// others found out ends at the header. Which bit stands for which block, and
// since when, would be a guess, and a wrong one an incomplete backup. A host
// tells the changes when asked (QueryChangedDiskAreas).
func trackingMap(name string, head []byte) error {
	what := "a change tracking file"
	if len(head) >= 8 {
		what = fmt.Sprintf("%s of version %d", what, binary.LittleEndian.Uint32(head[4:]))
	}
	return fmt.Errorf("%s: %s: it holds no disk, and its layout is VMware's secret; open the descriptor beside it: %w", name, what, fault.ErrUnsupported)
}

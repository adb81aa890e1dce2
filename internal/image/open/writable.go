package open

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// ErrOption says that a format cannot be written the way that was asked for,
// whatever the disk.
var ErrOption = errors.New("not offered")

// An offer is what a format can be written like.
type offer struct {
	format       image.Format
	variants     []string // the usual one first; none where there is only one
	layers       []string // variants that may have a parent; "" is none named
	compressions []string
	maxLevel     map[string]int // of compressions, and of variants that are compressed by nature
	sectors      []int          // besides 512
	// Bytes of a block, cluster or grain, a power of two; 0 where there are none.
	minBlock, maxBlock int64
}

var offers = []offer{
	{format: image.Raw},
	{
		format: image.Qcow2, layers: []string{""}, minBlock: 512, maxBlock: 2 << 20,
		compressions: []string{"zlib", "zstd"}, maxLevel: map[string]int{"zlib": 9, "zstd": 22},
	},
	{
		format: image.VHD, minBlock: 512 << 10, maxBlock: 256 << 20,
		variants: []string{"dynamic", "fixed"}, layers: []string{"", "differencing"},
	},
	{
		format: image.VHDX, minBlock: 1 << 20, maxBlock: 256 << 20, sectors: []int{4096},
		variants: []string{"dynamic", "fixed"}, layers: []string{"", "differencing"},
	},
	{
		format: image.VMDK, minBlock: 4 << 10, maxBlock: 1 << 20, maxLevel: map[string]int{vmdk.StreamOptimized: 9},
		variants: vmdk.Variants, layers: []string{"", vmdk.MonolithicSparse},
	},
	{format: image.OVA, maxLevel: map[string]int{"": 9}}, // always compressed
}

func offerOf(f image.Format) offer {
	for _, w := range offers {
		if w.format == f {
			return w
		}
	}
	return offer{}
}

// Formats are those that can be written.
func Formats() []image.Format {
	var list []image.Format
	for _, w := range offers {
		list = append(list, w.format)
	}
	return list
}

// Readable are the formats that can be read: those, and some that others
// should write.
func Readable() []image.Format { return append(Formats(), image.VDI) }

// Variants are those in which format f can be written, the usual one first;
// none for a format that has only one.
func Variants(f image.Format) []string { return slices.Clone(offerOf(f).variants) }

// Compressions are those that format f can be written with, besides none.
func Compressions(f image.Format) []string { return slices.Clone(offerOf(f).compressions) }

// Layered says whether an image of format f that is written in that variant
// may have a parent.
func Layered(f image.Format, variant string) bool {
	return slices.Contains(offerOf(f).layers, variant)
}

// CheckCreate says what of o no image of format f can have, as an ErrOption
// that lists what it can. What depends on the disk's size or on its parent is
// left to Create.
func CheckCreate(f image.Format, o image.CreateOptions) error {
	w := offerOf(f)
	refuse := func(what string, asked any, offered ...string) error {
		if len(offered) == 0 {
			return fmt.Errorf("%s %v: %s images have none: %w", what, asked, f, ErrOption)
		}
		return fmt.Errorf("%s %v: for %s images take %s: %w", what, asked, f, strings.Join(offered, ", "), ErrOption)
	}
	variants := w.variants
	if o.Parent != "" && len(variants) > 0 {
		variants = slices.DeleteFunc(slices.Clone(w.layers), func(v string) bool { return v == "" })
	}
	switch {
	case w.format == "":
		return fmt.Errorf("format %q cannot be written: take one of %v: %w", f, Formats(), ErrOption)
	case o.Parent != "" && len(w.layers) == 0:
		return refuse("parent", o.Parent)
	case o.Variant != "" && !slices.Contains(variants, o.Variant):
		return refuse("variant", o.Variant, variants...)
	case o.Compression != "" && !slices.Contains(w.compressions, o.Compression):
		return refuse("compression", o.Compression, w.compressions...)
	case o.SectorBytes != 0 && o.SectorBytes != 512 && !slices.Contains(w.sectors, o.SectorBytes):
		return refuse("sectors of", o.SectorBytes, append([]string{"512"}, texts(w.sectors)...)...)
	}
	if o.Level != 0 {
		kind := o.Compression
		if kind == "" {
			kind = o.Variant
		}
		most := w.maxLevel[kind]
		if most == 0 {
			return fmt.Errorf("level %d of no compression: %w", o.Level, ErrOption)
		}
		if o.Level < 0 || o.Level > most {
			return refuse("level", o.Level, fmt.Sprintf("1 to %d", most))
		}
	}
	if n := o.BlockBytes; n != 0 {
		if w.maxBlock == 0 {
			return refuse("blocks of", n)
		}
		if n < w.minBlock || n > w.maxBlock || bits.OnesCount64(uint64(n)) != 1 {
			return refuse("blocks of", n, fmt.Sprintf("a power of two from %d to %d bytes", w.minBlock, w.maxBlock))
		}
	}
	return nil
}

func texts(list []int) []string {
	var out []string
	for _, n := range list {
		out = append(out, fmt.Sprint(n))
	}
	return out
}

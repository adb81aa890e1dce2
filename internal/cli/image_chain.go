package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
)

func (a *app) imageChainCmd() *cobra.Command {
	var in imageInput
	cmd := &cobra.Command{
		Use:   "chain TOP",
		Short: "show the layers of a disk and what each of them holds",
		Long: `Show the layers that a disk is made of, from the named image down to its base.
Parents are opened only with --parents. Where a parent is missing or is not the
right one, the layers above it are shown and the error says what is wrong.

The bar is the disk from its first byte to its last: # where the layer holds
data, 0 where it holds zeros, . where it holds nothing and its parent counts.
A cell shows what the most of it is, but # wherever there is any data.

With --json: one object per layer, the top first: depth, file, the fields of
"image info", and data_bytes, zero_bytes, absent_bytes, compressed_bytes, which
are bytes of the disk that this layer alone holds so.`,
		Example: `  backstay image chain --parents snapshot2.vmdk
  backstay image chain --parents=/vms --json web01.avhdx`,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, err := in.files(cmd, args, 1)
			if err != nil {
				return err
			}
			return a.imageChain(cmd.Context(), in, args[0])
		},
	}
	in.flags(cmd, "what TOP is")
	return cmd
}

// A chainLayer is a layer as image chain --json prints it.
type chainLayer struct {
	Depth int    `json:"depth"`
	File  string `json:"file"`
	image.Info
	Data       int64 `json:"data_bytes"`
	Zero       int64 `json:"zero_bytes"`
	Absent     int64 `json:"absent_bytes"`
	Compressed int64 `json:"compressed_bytes"`

	picture string
}

func (a *app) imageChain(ctx context.Context, in imageInput, top string) error {
	o, err := in.options(top, false)
	if err != nil {
		return err
	}
	depth := 0
	var last image.Info
	err = open.Chain(top, o, func(path string, layer image.Image) error {
		l, err := look(ctx, layer)
		if err != nil {
			return err
		}
		l.Depth, l.File, last = depth, path, l.Info
		depth++
		return a.printLayer(l)
	})
	if err == nil {
		return nil
	}
	if depth > 0 && !a.json && last.Parent != "" && !errors.Is(err, context.Canceled) {
		fmt.Fprintf(a.stdout, "   │\n%2d ╳ %s: not opened\n", depth, clean(last.Parent))
	}
	return imageHint(err, top)
}

// look walks one layer.
func look(ctx context.Context, layer image.Image) (chainLayer, error) {
	l := chainLayer{Info: layer.Info()}
	var p picture
	for e, err := range layer.Extents(ctx, extent.Extent{Len: layer.Size()}) {
		if err != nil {
			return l, err
		}
		switch e.Kind {
		case image.Data:
			l.Data += e.Len
		case image.Zero:
			l.Zero += e.Len
		default:
			l.Absent += e.Len
		}
		if e.Compressed {
			l.Compressed += e.Len
		}
		p.add(e, layer.Size())
	}
	l.picture = p.String()
	return l, nil
}

// A picture is a layer's disk in a few characters.
type picture [48]struct {
	data bool
	zero int64 // bytes
	none int64
}

// add records an extent of a disk of size bytes.
func (p *picture) add(e image.Extent, size int64) {
	cell := max(size/int64(len(p)), 1)
	for off := e.Off; off < e.End(); {
		i := min(off/cell, int64(len(p))-1)
		end := min(e.End(), (i+1)*cell)
		if i == int64(len(p))-1 {
			end = e.End()
		}
		switch e.Kind {
		case image.Data:
			p[i].data = true
		case image.Zero:
			p[i].zero += end - off
		default:
			p[i].none += end - off
		}
		off = end
	}
}

func (p *picture) String() string {
	var b strings.Builder
	for _, c := range p {
		switch {
		case c.data:
			b.WriteByte('#')
		case c.zero > c.none:
			b.WriteByte('0')
		default:
			b.WriteByte('.')
		}
	}
	return b.String()
}

func (a *app) printLayer(l chainLayer) error {
	if a.json {
		return a.printJSON(l)
	}
	if l.Depth > 0 {
		fmt.Fprintln(a.stdout, "   │")
	}
	fmt.Fprintf(a.stdout, "%2d ■ %s\n", l.Depth, clean(l.File))
	mark := "│"
	if l.Parent == "" {
		mark = " "
	}
	line := func(format string, args ...any) {
		fmt.Fprintf(a.stdout, "   %s %s\n", mark, clean(fmt.Sprintf(format, args...)))
	}
	kind := strings.TrimSpace(string(l.Format) + " " + l.Variant)
	line("%s, disk of %s, file of %s", kind, sizeText(l.VirtualBytes), sizeText(l.FileBytes))
	if l.Identity != "" {
		line("identity %s", l.Identity)
	}
	line("[%s]", l.picture)
	held := fmt.Sprintf("data %s", sizeText(l.Data))
	if l.Compressed > 0 {
		held += fmt.Sprintf(" (%s of it compressed)", sizeText(l.Compressed))
	}
	line("%s, zero %s, absent %s", held, sizeText(l.Zero), sizeText(l.Absent))
	if l.Parent != "" {
		line("parent %s", l.Parent)
	}
	for _, warning := range l.Warnings {
		line("warning: %s", warning)
	}
	return nil
}

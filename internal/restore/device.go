package restore

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// openDevice opens an existing image of format f for writing and holds it.
func openDevice(ctx context.Context, path string, f image.Format) (device, error) {
	file, err := openForWriting(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	switch {
	case err != nil:
	case info.Mode().IsRegular(), info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice:
		err = lockImage(file)
	default:
		err = fmt.Errorf("%s is neither a regular file nor a block device", path)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	if f != image.Raw {
		file.Close() // qemu-nbd takes the same locks
		return openThroughQemu(ctx, path, f)
	}
	size, err := file.Seek(0, io.SeekEnd) // a device's Stat says 0
	if err != nil {
		file.Close()
		return nil, err
	}
	return &rawDevice{file, size, info.Mode().IsRegular()}, nil
}

// A rawDevice is a raw image file or a block device.
type rawDevice struct {
	*os.File
	size    int64
	regular bool
}

func (d *rawDevice) Size() int64 { return d.size }

func (d *rawDevice) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	if !d.regular {
		return extent.NewSet(within), nil
	}
	var set extent.Set
	for off := within.Off; off < within.End(); {
		if err := ctx.Err(); err != nil {
			return set, err
		}
		data, hole, ok := nextData(d.File, off, d.size)
		if !ok {
			data, hole = off, within.End()
		}
		set.Add(extent.Extent{Off: data, Len: hole - data}.Intersect(within))
		off = hole
	}
	return set, nil
}

func (d *rawDevice) Zero(ctx context.Context, e extent.Extent) error {
	if done, err := punch(d.File, e.Off, e.Len); done || err != nil {
		return err
	}
	zeros := make([]byte, min(e.Len, 1<<20))
	for e.Len > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := d.WriteAt(zeros[:min(e.Len, int64(len(zeros)))], e.Off)
		if err != nil {
			return err
		}
		e.Off, e.Len = e.Off+int64(n), e.Len-int64(n)
	}
	return nil
}

func (d *rawDevice) Flush(context.Context) error { return d.Sync() }

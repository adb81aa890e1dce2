package lab

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// writeCPIO writes the tree below root as a cpio archive in the "newc" form,
// the one the kernel unpacks as an initramfs. Everything belongs to root and
// has no time, so equal trees make equal archives.
func writeCPIO(w io.Writer, root string) error {
	c := cpioWriter{w: w}
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil || file == root {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := uint32(info.Mode().Perm())
		switch {
		case d.IsDir():
			return c.entry(filepath.ToSlash(name), 0o040000|mode, nil)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			return c.entry(filepath.ToSlash(name), 0o120777, []byte(target))
		case info.Mode().IsRegular():
			data, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			return c.entry(filepath.ToSlash(name), 0o100000|mode, data)
		}
		return fmt.Errorf("%s: %v has no place in an initramfs", file, info.Mode().Type())
	})
	if err != nil {
		return err
	}
	return c.entry("TRAILER!!!", 0, nil)
}

type cpioWriter struct {
	w     io.Writer
	inode uint32
}

func (c *cpioWriter) entry(name string, mode uint32, data []byte) error {
	c.inode++
	links := 1
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	if err := c.padded([]byte(head)); err != nil {
		return err
	}
	return c.padded(data)
}

// padded writes p and fills up to a multiple of four bytes.
func (c *cpioWriter) padded(p []byte) error {
	if _, err := c.w.Write(p); err != nil {
		return err
	}
	_, err := c.w.Write(make([]byte, -len(p)&3))
	return err
}

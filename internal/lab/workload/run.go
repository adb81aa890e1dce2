package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// run writes a record every so often until it is killed. Before the first it
// brings what a crash left to a state from which it can go on: a torn line is
// cut off and a block that lags is written again.
//
// Told to freeze by the FIFO control, it finishes its record, leaves the mark,
// answers, and waits to be told to thaw.
func run(dir string, every time.Duration, control, answer string) error {
	r, err := verify(dir)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, logName), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	data, err := os.OpenFile(filepath.Join(dir, blockName), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	if r.last == 0 {
		if _, err := data.WriteAt(make([]byte, blocks*blockBytes), 0); err != nil {
			return err
		}
	}
	if err := log.Truncate(int64(r.last) * lineBytes); err != nil {
		return err
	}
	if r.lagging {
		if err := putBlock(data, next(r.last)); err != nil {
			return err
		}
	}
	if err := unmark(dir); err != nil {
		return err
	}
	if err := data.Sync(); err != nil {
		return err
	}

	orders := make(chan string)
	if control != "" {
		go listen(control, orders)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for seq := r.last + 1; ; {
		select {
		case order := <-orders:
			if err := obey(dir, order, orders, answer); err != nil {
				return err
			}
		case <-tick.C:
			e := next(seq)
			if _, err := log.WriteAt([]byte(e.line()), int64(seq-1)*lineBytes); err != nil {
				return err
			}
			if err := log.Sync(); err != nil {
				return err
			}
			if err := putBlock(data, e); err != nil {
				return err
			}
			seq++
		}
	}
}

// putBlock writes the block and waits until it is on the disk.
func putBlock(data *os.File, e entry) error {
	if _, err := data.WriteAt(e.content(), int64(e.block)*blockBytes); err != nil {
		return err
	}
	return data.Sync()
}

// obey carries out an order, and for "freeze" comes back after the thaw.
func obey(dir, order string, orders <-chan string, answer string) error {
	if order == "freeze" {
		if err := mark(dir); err != nil {
			return err
		}
		if err := reply(answer, "still"); err != nil {
			return err
		}
		for order != "thaw" {
			order = <-orders
		}
		if err := unmark(dir); err != nil {
			return err
		}
	}
	return reply(answer, "writing")
}

func reply(answer, word string) error {
	f, err := os.OpenFile(answer, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, word)
	return err
}

func mark(dir string) error {
	f, err := os.Create(filepath.Join(dir, markName))
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	f.Close()
	return syncDir(dir)
}

func unmark(dir string) error {
	err := os.Remove(filepath.Join(dir, markName))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// listen reads orders, one a line. The FIFO is opened for both directions, so
// that it does not end when a writer goes.
func listen(control string, orders chan<- string) {
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		return
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		orders <- lines.Text()
	}
}

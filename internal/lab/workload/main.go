// Command workload writes records that prove themselves, as a database would:
// first a line in a log, on the disk before anything else happens, then the
// block that the line tells of. Looking at a copy of its directory it can say
// whether the copy is one moment of the original, and whether the original
// knew of the copy and held still.
//
//	workload run -dir D       write until killed
//	workload verify -dir D    look at what is there, then say so in one line
//	workload fill -dir D -bytes N -seed S    files of known content
//	workload check -dir D     are those files as they were written?
package main

import (
	"flag"
	"fmt"
	"os"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: workload run|verify|fill|check -dir DIRECTORY")
		os.Exit(2)
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	dir := flags.String("dir", ".", "where the records are")
	every := flags.Duration("every", 20*time.Millisecond, "time between two records")
	control := flags.String("control", "", "a FIFO that says freeze or thaw")
	answer := flags.String("answer", "", "a FIFO for the answer")
	size := flags.Int64("bytes", 1<<20, "how much to fill")
	seed := flags.Int64("seed", 1, "what to fill with")
	flags.Parse(os.Args[2:])

	var err error
	switch os.Args[1] {
	case "run":
		err = run(*dir, *every, *control, *answer)
	case "verify":
		var r report
		if r, err = verify(*dir); err == nil {
			fmt.Println("WORKLOAD VERIFY OK", r)
		} else {
			fmt.Println("WORKLOAD VERIFY FAILED", err)
			os.Exit(1)
		}
	case "fill":
		err = fill(*dir, *size, *seed)
	case "check":
		var n int64
		if n, err = check(*dir); err == nil {
			fmt.Println("WORKLOAD CHECK OK bytes", n)
		}
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

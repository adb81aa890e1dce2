package blob

// A ReadShape says how many reads of which size suit a store. Each costs a
// round trip, and some stores ask money for it; bytes that nobody wanted cost
// time as well.
type ReadShape struct {
	Gap      int64 // unwanted bytes that are read rather than skipped
	Run      int64 // bytes that one read asks for; what begins within them is read to its end
	InFlight int   // reads at once; 0 for one for each worker
	Memory   int64 // bytes that all reads at once may take, but for one that is larger; 0 for no bound
}

// A ReadShaper is a Store that is not read like a local disk.
type ReadShaper interface {
	ReadShape() ReadShape
}

// ShapeOf is how st is read best. Without its own word it is a local disk,
// where a short seek costs less than 128 KiB.
func ShapeOf(st Store) ReadShape {
	if s, ok := st.(ReadShaper); ok {
		return s.ReadShape()
	}
	return ReadShape{Gap: 128 << 10, Run: 4 << 20}
}

// Remote is the ReadShape of object storage. A pack of 64 MiB is read in four
// requests; 64 in flight hide the latency of small ones, and 256 MiB of memory
// hold 16 of the largest.
var Remote = ReadShape{Gap: 1 << 20, Run: 16 << 20, InFlight: 64, Memory: 256 << 20}

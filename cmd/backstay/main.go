// Command backstay backs up virtual machines at image level and brings them
// back.
package main

import (
	"os"

	"github.com/backstay/backstay/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }

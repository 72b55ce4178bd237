package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/status"
)

func storeGrowCommand() *cobra.Command {
	var size string
	cmd := &cobra.Command{
		Use: "grow PATH", Short: "Let a store use more of its disk, or a longer file", Args: cobra.ExactArgs(1),
		Long: `Let a store use all of a device that has become larger, or make its file longer. The
store's host must not run; the volumes go on with their other copies meanwhile. A file
whose space is reserved stays so. Nothing is moved, and nothing can be lost: a crash
leaves the store as it was, or grown.`,
		Example: "  cairn store grow /srv/cairn/store-1 --size 4T\n  cairn store grow /dev/vg0/cairn",
		RunE: func(_ *cobra.Command, args []string) error {
			var want uint64
			if size != "" {
				n, err := parseSize(size)
				if err != nil {
					return err
				}
				want = n
			}
			before, after, err := growStore(args[0], int64(want))
			if err != nil {
				return err
			}
			fmt.Printf("store %s: %s -> %s\n", args[0], formatSize(uint64(before)), formatSize(uint64(after)))
			return nil
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "what the file is to have; not for a device")
	return cmd
}

// growStore extends a store's file to size, or takes a device as it is, and lets
// the store use it.
func growStore(path string, size int64) (before, after int64, err error) {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, status.Errorf(status.NotFound, "there is no file or device %s", path)
	}
	if err != nil {
		return 0, 0, err
	}
	d, err := disk.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	switch {
	case d.Device() && size > 0:
		return 0, 0, usagef("a device has the size it has: leave --size away")
	case !d.Device() && size == 0:
		return 0, 0, usagef("say how large the file is to be: --size")
	}
	if err := store.Growable(d, max(size, d.Size())); err != nil {
		return 0, 0, err
	}
	if !d.Device() && size > d.Size() {
		reserved := st.Sys().(*syscall.Stat_t).Blocks*512 >= d.Size()
		if err := d.Extend(size, reserved); err != nil {
			return 0, 0, err
		}
	}
	return store.Grow(d)
}

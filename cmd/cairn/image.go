package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	nbdclient "github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	imageWait    = 24 * time.Hour // an image may be large: Ctrl-C ends it
	imagePiece   = 1 << 20        // bytes per request
	imageWorkers = 4              // requests in flight
)

func volumeImport(c *cli) *cobra.Command {
	var replicas uint32
	var size string
	cmd := &cobra.Command{
		Use:   "import NAME FILE",
		Short: "Fill a new volume from a disk image",
		Long: `Create a volume and fill it from a disk image: raw, or whatever else qemu-img reads
(qcow2, vmdk, …). Holes and zeros of the image stay holes of the volume.`,
		Example: "  cairn volume import root debian.raw\n  cairn volume import root debian.qcow2 --size 20G",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), imageWait, func(ctx context.Context, s *session) error {
				var n uint64
				if size != "" {
					var err error
					if n, err = parseSize(size); err != nil {
						return err
					}
				}
				return s.importAny(ctx, args[0], args[1], n, replicas)
			})
		},
	}
	cmd.Flags().Uint32Var(&replicas, "replicas", 0, "copies, 1 to 5 (default 3, or as many as there are failure domains)")
	cmd.Flags().StringVar(&size, "size", "", "size of the volume (default: the image's)")
	return cmd
}

// importImage creates the volume, copies, flushes and lets it go. A failure
// leaves no half-filled volume behind.
func (s *session) importImage(ctx context.Context, name, path string, size uint64, replicas uint32) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("cannot read the image: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	end, err := f.Seek(0, io.SeekEnd) // works for block devices too
	if err != nil {
		return fmt.Errorf("cannot tell the size of %s: %w", path, err)
	}
	if end == 0 {
		return status.Errorf(status.Invalid, "%s is empty: there is nothing to import", path)
	}
	if size == 0 {
		size = (uint64(end) + ids.BlockSize - 1) / ids.BlockSize * ids.BlockSize
	}
	if uint64(end) > size {
		return usagef("--size %d is smaller than the image, %d bytes", size, end)
	}
	_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: size, Replicas: replicas}}})
	if err != nil {
		return err
	}
	err = s.withDevice(ctx, name, func(dev *nbdclient.Client) error {
		bar := newBar("importing "+name, end)
		err := copyPieces(ctx, end, bar, func(buf []byte, off int64) error {
			if _, err := f.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("cannot read the image: %w", err)
			}
			return writePiece(dev, buf, off)
		})
		bar.finish()
		if err == nil {
			err = dev.Flush()
		}
		return err
	})
	if err != nil {
		err = errors.Join(err, s.discardVolume(name))
	}
	return err
}

// discardVolume removes a volume whose import failed; the command's own
// context may be over.
func (s *session) discardVolume(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cliWait)
	defer cancel()
	if err := s.detach(ctx, name); err != nil {
		return fmt.Errorf("the half-filled volume %s is still there: %w", name, err)
	}
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name}}})
	if err != nil {
		return fmt.Errorf("the half-filled volume %s is still there: %w", name, err)
	}
	return nil
}

// writePiece writes the runs of blocks in buf that are not all zeros.
func writePiece(dev io.WriterAt, buf []byte, off int64) error {
	from := -1 // start of the run
	for i := 0; ; i += ids.BlockSize {
		data := i < len(buf) && !isZero(buf[i:min(i+ids.BlockSize, len(buf))])
		switch {
		case data && from < 0:
			from = i
		case !data && from >= 0:
			end := min(i, len(buf))
			if _, err := dev.WriteAt(buf[from:end], off+int64(from)); err != nil {
				return err
			}
			from = -1
		}
		if i >= len(buf) {
			return nil
		}
	}
}

var zeroBlock [ids.BlockSize]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

// copyPieces runs move over [0, end) in pieces, several at a time.
func copyPieces(ctx context.Context, end int64, bar *bar, move func(buf []byte, off int64) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	offs := make(chan int64)
	var wg sync.WaitGroup
	for range imageWorkers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			buf := make([]byte, imagePiece)
			for off := range offs {
				b := buf[:min(int64(imagePiece), end-off)]
				clear(b)
				if err := move(b, off); err != nil {
					cancel(err)
					return
				}
				bar.add(int64(len(b)))
			}
		}()
	}
feed:
	for off := int64(0); off < end; off += imagePiece {
		select {
		case offs <- off:
		case <-ctx.Done():
			break feed
		}
	}
	close(offs)
	wg.Wait()
	return context.Cause(ctx)
}

// withDevice attaches a volume if need be, opens it over NBD and leaves it as
// it was found.
func (s *session) withDevice(ctx context.Context, name string, f func(*nbdclient.Client) error) (err error) {
	uri, host, ours, err := s.open(ctx, name)
	if err != nil {
		return err
	}
	if ours {
		defer func() {
			ctx, cancel := context.WithTimeout(context.Background(), cliWait)
			defer cancel()
			err = errors.Join(err, s.detach(ctx, name))
		}()
	}
	dev, err := nbdclient.Dial(ctx, uri, nil)
	if err != nil {
		return fmt.Errorf("cannot open %s (its socket is on host %s: run this there): %w", uri, host, err)
	}
	return errors.Join(f(dev), dev.Close())
}

// open attaches a volume, or has a snapshot shown; ours: nobody had before.
func (s *session) open(ctx context.Context, name string) (uri, host string, ours bool, err error) {
	if strings.Contains(name, "@") {
		return s.openSnapshot(ctx, name, "")
	}
	v, err := s.volume(ctx, name)
	if err != nil {
		return "", "", false, err
	}
	uri, err = s.attach(ctx, name, "", false)
	return uri, v.HolderHost, v.HolderHost == "", err
}

func volumeExport(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "export NAME FILE", Short: "Write a volume, or a snapshot, to a new raw image; holes stay holes", Args: cobra.ExactArgs(2),
		Example: "  cairn volume export root root.raw\n  cairn volume export root@monday root.raw",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), imageWait, func(ctx context.Context, s *session) error {
				return s.exportImage(ctx, args[0], args[1])
			})
		},
	}
}

func (s *session) exportImage(ctx context.Context, name, path string) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return status.Errorf(status.Exists, "%s exists: name a new file", path)
	}
	if err != nil {
		return fmt.Errorf("cannot make the image: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	return s.withDevice(ctx, name, func(dev *nbdclient.Client) error {
		end := int64(dev.Size())
		if err := f.Truncate(end); err != nil {
			return fmt.Errorf("cannot size the image: %w", err)
		}
		bar := newBar("exporting "+name, end)
		err := copyPieces(ctx, end, bar, func(buf []byte, off int64) error {
			if _, err := dev.ReadAt(buf, off); err != nil {
				return err
			}
			return writePiece(f, buf, off)
		})
		bar.finish()
		if err != nil {
			return err
		}
		return f.Sync()
	})
}

// bar shows progress on a terminal, and a line at the end elsewhere.
type bar struct {
	what  string
	total int64
	began time.Time
	p     *mpb.Progress
	b     *mpb.Bar
}

func newBar(what string, total int64) *bar {
	b := &bar{what: what, total: total, began: time.Now()}
	if onTerminal() {
		b.p = mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(60))
		b.b = b.p.AddBar(total,
			mpb.PrependDecorators(decor.Name(what+" "), decor.CountersKibiByte("% .1f / % .1f")),
			mpb.AppendDecorators(decor.Percentage(), decor.Name(" "), decor.AverageSpeed(decor.SizeB1024(0), "% .0f"), decor.Name(" "), decor.AverageETA(decor.ET_STYLE_GO)))
	}
	return b
}

func (b *bar) add(n int64) {
	if b.b != nil {
		b.b.IncrInt64(n)
	}
}

func (b *bar) finish() {
	if b.b != nil {
		if !b.b.Completed() {
			b.b.Abort(false)
		}
		b.p.Wait()
		return
	}
	say("%s: %s in %.1f s", b.what, formatSize(uint64(b.total)), time.Since(b.began).Seconds())
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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

// importImage makes a volume of a raw image.
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
	return s.fillVolume(ctx, &pb.CreateVolume{Name: name, SizeBytes: size, Replicas: replicas}, func(dev *nbdclient.Client, _ bool) error {
		bar := newBar("importing "+name, end)
		err := copyPieces(ctx, end, bar, func(buf []byte, off int64) error {
			if n, err := f.ReadAt(buf, off); n < len(buf) {
				return fmt.Errorf("cannot read the image at byte %d: %w", off+int64(n), err)
			}
			return writePiece(failing{dev}, buf, off)
		})
		bar.finish(err)
		return err
	})
}

// failing is a device whose first failed write ends all others: on a full pool one
// may wait for room for as long as there is none.
type failing struct{ dev *nbdclient.Client }

func (f failing) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.dev.WriteAt(p, off)
	if err != nil {
		go func() { _ = f.dev.Close() }() // onDevice's Close says the same
	}
	return n, err
}

// partSuffix ends the name of a volume, or a file, that is being filled: under its
// own name there is only what is whole.
const partSuffix = ".part"

// fillVolume makes a volume and has f fill it; until that is done its name ends with
// partSuffix. A failure leaves nothing behind, but for one that lets tags tell what it
// is filled from: what was cut short, again, is gone on with.
func (s *session) fillVolume(ctx context.Context, op *pb.CreateVolume, f func(dev *nbdclient.Client, again bool) error) error {
	name, again := op.Name, false
	if _, err := s.volume(ctx, name); err == nil {
		return status.Errorf(status.Exists, "volume %s exists already: choose another name", name)
	} else if status.Of(err) != status.NotFound {
		return err
	}
	op.Name = name + partSuffix
	drop := fmt.Sprintf("`cairn volume detach %s`, if it is attached, and `cairn volume rm %s --now` drop it", op.Name, op.Name)
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: op}})
	if status.Of(err) == status.Exists {
		v, verr := s.volume(ctx, op.Name)
		if verr != nil {
			return errors.Join(err, verr)
		}
		if len(op.Tags) == 0 || !maps.Equal(v.Tags, op.Tags) || v.SizeBytes != op.SizeBytes {
			return status.Errorf(status.Exists, "volume %s is there: it is being filled with something else, or that was cut short; %s", op.Name, drop)
		}
		again, err = true, nil
		say("going on with volume %s", op.Name)
	}
	if err != nil {
		return err
	}
	uri, host, _, err := s.open(ctx, op.Name)
	if err == nil {
		err = s.onDevice(ctx, host, uri, func(dev *nbdclient.Client) error {
			if err := f(dev, again); err != nil {
				return err
			}
			return dev.Flush()
		})
	}
	switch k := status.Of(err); {
	case err == nil:
		return s.nameFilled(ctx, op.Name, name)
	case len(op.Tags) > 0 && (ctx.Err() != nil || k == status.Unavailable || k == status.Timeout):
		return fmt.Errorf("%w; what is there stays as volume %s, and the same command goes on with it; %s", err, op.Name, drop)
	}
	return errors.Join(err, s.discardVolume(op.Name))
}

// nameFilled lets go of a volume that is whole and gives it its name.
func (s *session) nameFilled(ctx context.Context, part, name string) error {
	v, err := s.volume(ctx, part)
	if err == nil && v.HolderHost != "" {
		err = s.detach(ctx, part)
	}
	if err == nil {
		_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RenameVolume{RenameVolume: &pb.RenameVolume{Volume: part, Name: name}}})
	}
	if err != nil {
		return fmt.Errorf("volume %s is complete, but has not got the name %s: %w", part, name, err)
	}
	return nil
}

// discardVolume removes a volume that could not be filled; the command's own
// context may be over.
func (s *session) discardVolume(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cliWait)
	defer cancel()
	v, err := s.volume(ctx, name)
	if err == nil && v.HolderHost != "" {
		err = s.detachBy(ctx, v.Name, true) // on a full pool a write may wait for the room it has taken itself
	}
	if err == nil {
		_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name}}})
	}
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

// copyPieces runs move over [0, end) in pieces, several at a time; the first error
// ends it.
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
	return s.onDevice(ctx, host, uri, f)
}

// onDevice opens an export and runs f, whose requests end with ctx.
func (s *session) onDevice(ctx context.Context, host, uri string, f func(*nbdclient.Client) error) error {
	dev, err := nbdclient.Dial(ctx, uri, nil)
	if err != nil {
		return fmt.Errorf("cannot open %s (its socket is on host %s: run this there): %w", uri, host, err)
	}
	end := context.AfterFunc(ctx, func() { _ = dev.Close() }) // the Close below says the same
	defer end()
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

// exportImage writes a file beside path, and gives it that name when it is whole.
func (s *session) exportImage(ctx context.Context, name, path string) (err error) {
	if _, err := os.Lstat(path); err == nil {
		return status.Errorf(status.Exists, "%s exists: name a new file", path)
	}
	part := path + partSuffix
	f, err := os.OpenFile(part, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return status.Errorf(status.Exists, "%s exists: another export writes it, or was killed: remove it then", part)
	}
	if err != nil {
		return fmt.Errorf("cannot make the image: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil { // unlike a rename, this replaces nothing
			err = os.Link(part, path)
		}
		err = errors.Join(err, os.Remove(part))
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
		if err == nil {
			err = f.Sync()
		}
		if bar.finish(err); err != nil {
			return fmt.Errorf("no image of %s: %w", name, err)
		}
		return nil
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

// finish ends the bar; what failed has no last line.
func (b *bar) finish(err error) {
	if b.b != nil {
		if err == nil {
			b.b.SetTotal(-1, true) // holes and what was there already are not counted
		} else {
			b.b.Abort(false)
		}
		b.p.Wait()
		return
	}
	if err == nil {
		say("%s: %s in %.1f s", b.what, formatSize(uint64(b.total)), time.Since(b.began).Seconds())
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cairnstore/cairn/proto/status"
)

// escapeKey leaves the console: Ctrl-].
const escapeKey = 0x1d

func vmConsole(c *cli) *cobra.Command {
	return &cobra.Command{
		Example: "  cairn vm console web",
		Use:     "console NAME", Short: "Talk to a VM's serial console (on its host); Ctrl-] leaves", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var socket string
			err := c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				vm, err := s.vm(ctx, args[0])
				if err != nil {
					return err
				}
				w := s.vmView(ctx, vm)
				if socket = w.Console; socket == "" {
					return status.Errorf(status.Conflict, "VM %s is %s and has no console", vm.Name, w.State)
				}
				return nil
			})
			if err != nil {
				return err
			}
			return console(cmd.Context(), socket)
		},
	}
}

// console joins this terminal to a unix socket until the escape key, the end of
// input, or the end of the guest.
func console(ctx context.Context, socket string) (err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return fmt.Errorf("cannot reach the console (is the VM on this machine, and is nobody else connected?): %w", err)
	}
	stop := context.AfterFunc(ctx, func() { err = errors.Join(err, ignoreClosed(conn.Close())) })
	defer stop()
	if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
		say("connected; Ctrl-] leaves")
		old, err := term.MakeRaw(fd)
		if err != nil {
			return err
		}
		defer func() { must(term.Restore(fd, old)) }()
	}
	done := make(chan error, 2)
	go func() { _, err := io.Copy(os.Stdout, conn); done <- err }()
	go func() { done <- copyUntilEscape(conn, os.Stdin) }()
	err = <-done
	return errors.Join(ignoreClosed(err), ignoreClosed(conn.Close()))
}

func copyUntilEscape(w io.Writer, r io.Reader) error {
	buf := make([]byte, 1024)
	for {
		n, err := r.Read(buf)
		for i := range n {
			if buf[i] == escapeKey {
				_, err := w.Write(buf[:i])
				return err
			}
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

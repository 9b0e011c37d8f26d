import faulthandler

faulthandler.dump_traceback_later(100, exit=True)
